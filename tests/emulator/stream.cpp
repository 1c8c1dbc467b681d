// SPDX-License-Identifier: MIT
// Streams, which are threads with a queue; events; and graphs, which are what a
// queue was given while it was captured.
#include "emulator/stream.h"

#include "emulator/device.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string.h>
#include <thread>
#include <unistd.h>

using work_t = std::function<void()>;

// Of all that follows, and whoever waits for the end of something waits for the
// same condition: there is little of this.
static std::mutex lock;
static std::condition_variable *const ended = new std::condition_variable;

struct CUgraph_st {
    std::vector<work_t> works;
    std::vector<cudaStream_t> streams; // that are captured
};

struct CUgraphExec_st {
    std::vector<work_t> works;
};

struct CUstream_st {
    std::deque<work_t> works;    // the first one runs
    cudaGraph_t graph = nullptr; // that it is captured in
    const int device = emulator::current_device();
    bool ends = false;
    std::condition_variable given;
    std::thread thread;

    CUstream_st() : thread([this]() { serve(); })
    {
    }

    void serve()
    {
        std::unique_lock<std::mutex> held(lock);
        emulator::random random =
            emulator::random_of(0, (uint64_t)(uintptr_t)this);

        for (;;) {
            given.wait(held, [&]() { return ends || !works.empty(); });
            if (works.empty()) {
                return;
            }
            work_t work = works.front();

            held.unlock();
            if (random.one_in(8)) {
                (void)usleep(random.below(300));
            }
            work();
            held.lock();
            works.pop_front();
            if (works.empty()) {
                ended->notify_all();
            }
        }
    }
};

// How often it has been recorded, and how often that has been reached.
struct records {
    uint64_t asked = 0, reached = 0;
};

struct CUevent_st {
    std::shared_ptr<records> of = std::make_shared<records>();
    cudaGraph_t graph = nullptr; // where it was recorded last
};

// The default stream is one of its own, and no other one waits for it.
static cudaStream_t
stream_of(cudaStream_t stream)
{
    static cudaStream_t const default_stream = new CUstream_st;

    return stream == nullptr ? default_stream : stream;
}

namespace emulator
{

static void
give(cudaStream_t stream, work_t work)
{
    std::vector<work_t> *captured =
        stream->graph == nullptr ? nullptr : &stream->graph->works;

    if (captured != nullptr) {
        captured->push_back(std::move(work));
    } else {
        stream->works.push_back(std::move(work));
        stream->given.notify_one();
    }
}

cudaError_t
enqueue(cudaStream_t stream, work_t work)
{
    cudaStream_t to = stream_of(stream);
    std::lock_guard<std::mutex> held(lock);

    give(to, std::move(work));
    return cudaSuccess;
}

int
device_of(cudaStream_t stream)
{
    return stream == nullptr ? current_device() : stream->device;
}

} // namespace emulator

using emulator::device_of;
using emulator::enqueue;
using emulator::error;
using emulator::give;
using emulator::memory_reaches;

static void
join(cudaGraph_t graph, cudaStream_t stream)
{
    if (stream->graph == nullptr) {
        stream->graph = graph;
        graph->streams.push_back(stream);
    }
}

// ---- streams ----

cudaError_t
cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
    *stream = new CUstream_st;
    return cudaSuccess;
}

cudaError_t
cudaStreamDestroy(cudaStream_t stream)
{
    {
        std::lock_guard<std::mutex> held(lock);

        stream->ends = true;
        stream->given.notify_one();
    }
    stream->thread.join();
    delete stream;
    return cudaSuccess;
}

cudaError_t
cudaStreamQuery(cudaStream_t stream)
{
    cudaStream_t of = stream_of(stream);
    std::lock_guard<std::mutex> held(lock);

    return of->graph != nullptr ? error(cudaErrorStreamCaptureUnsupported)
           : of->works.empty()  ? cudaSuccess
                                : error(cudaErrorNotReady);
}

cudaError_t
cudaStreamSynchronize(cudaStream_t stream)
{
    cudaStream_t of = stream_of(stream);
    std::unique_lock<std::mutex> held(lock);

    if (of->graph != nullptr) {
        return error(cudaErrorStreamCaptureUnsupported);
    }
    ended->wait(held, [&]() { return of->works.empty(); });
    return cudaSuccess;
}

cudaError_t
cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                cudaStream_t stream)
{
    return memory_reaches(to, device_of(stream)) &&
                   memory_reaches(from, device_of(stream))
               ? enqueue(stream, [=]() { memcpy(to, from, bytes); })
               : error(cudaErrorIllegalAddress);
}

cudaError_t
cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    return memory_reaches(to, device_of(stream))
               ? enqueue(stream, [=]() { memset(to, value, bytes); })
               : error(cudaErrorIllegalAddress);
}

cudaError_t
cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *context)
{
    return enqueue(stream, [=]() { function(context); });
}

// ---- events ----

cudaError_t
cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t
cudaEventDestroy(cudaEvent_t event)
{
    delete event;
    return cudaSuccess;
}

cudaError_t
cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    cudaStream_t in = stream_of(stream);
    std::lock_guard<std::mutex> held(lock);
    auto of = event->of;

    event->graph = in->graph;
    if (in->graph != nullptr) {
        return cudaSuccess; // it orders what is captured, and no more
    }
    uint64_t record = ++of->asked;
    give(in, [=]() {
        std::lock_guard<std::mutex> then(lock);

        of->reached = std::max(of->reached, record);
        ended->notify_all();
    });
    return cudaSuccess;
}

cudaError_t
cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    cudaStream_t in = stream_of(stream);
    std::lock_guard<std::mutex> held(lock);
    auto of = event->of;
    uint64_t record = of->asked;

    if (event->graph != nullptr) {
        join(event->graph, in);
        return cudaSuccess;
    }
    if (in->graph != nullptr) {
        return error(cudaErrorStreamCaptureUnsupported);
    }
    give(in, [=]() {
        std::unique_lock<std::mutex> then(lock);

        ended->wait(then, [&]() { return of->reached >= record; });
    });
    return cudaSuccess;
}

cudaError_t
cudaEventQuery(cudaEvent_t event)
{
    std::lock_guard<std::mutex> held(lock);

    return event->of->reached >= event->of->asked ? cudaSuccess
                                                  : error(cudaErrorNotReady);
}

cudaError_t
cudaEventSynchronize(cudaEvent_t event)
{
    std::unique_lock<std::mutex> held(lock);
    auto of = event->of;
    uint64_t record = of->asked;

    ended->wait(held, [&]() { return of->reached >= record; });
    return cudaSuccess;
}

// ---- graphs ----

static thread_local cudaStreamCaptureMode capture_mode;

cudaError_t
cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode)
{
    std::swap(*mode, capture_mode);
    return cudaSuccess;
}

cudaError_t
cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    cudaStream_t of = stream_of(stream);
    std::lock_guard<std::mutex> held(lock);

    *status = of->graph == nullptr ? cudaStreamCaptureStatusNone
                                   : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t
cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode)
{
    std::lock_guard<std::mutex> held(lock);

    if (stream == nullptr || stream->graph != nullptr) {
        return error(cudaErrorStreamCaptureUnsupported);
    }
    join(new CUgraph_st, stream);
    return cudaSuccess;
}

cudaError_t
cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    std::lock_guard<std::mutex> held(lock);

    *graph = stream->graph;
    if (*graph == nullptr) {
        return error(cudaErrorStreamCaptureUnsupported);
    }
    for (cudaStream_t it : (*graph)->streams) {
        it->graph = nullptr;
    }
    return cudaSuccess;
}

cudaError_t
cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

cudaError_t
cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                              unsigned long long)
{
    *exec = new CUgraphExec_st{ graph->works };
    return cudaSuccess;
}

cudaError_t
cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    delete exec;
    return cudaSuccess;
}

cudaError_t
cudaGraphUpload(cudaGraphExec_t, cudaStream_t)
{
    return cudaSuccess;
}

cudaError_t
cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    cudaStream_t in = stream_of(stream);
    std::lock_guard<std::mutex> held(lock);

    for (const work_t &work : exec->works) {
        give(in, work);
    }
    return cudaSuccess;
}
