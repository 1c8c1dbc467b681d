// SPDX-License-Identifier: MIT
// Launches, and the OS threads that blocks run on.
#include "emulator/device.h"
#include "emulator/stream.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <stdlib.h>
#include <thread>

namespace emulator
{

// ---- blocks ----

// As many threads as there have ever been blocks at a time.  Never destroyed:
// they wait for blocks when the program ends.
struct pool {
    std::mutex lock;
    std::condition_variable changed;
    std::deque<std::function<void()>> blocks;
    size_t num_idle = 0;

    void run(std::function<void()> block)
    {
        std::lock_guard<std::mutex> held(lock);

        blocks.push_back(std::move(block));
        if (blocks.size() > num_idle) {
            num_idle++;
            std::thread([this]() { serve(); }).detach();
        }
        changed.notify_one();
    }

    void serve()
    {
        std::unique_lock<std::mutex> held(lock);

        for (;;) {
            changed.wait(held, [&]() { return !blocks.empty(); });
            auto block = std::move(blocks.front());

            blocks.pop_front();
            num_idle--;
            held.unlock();
            block();
            held.lock();
            num_idle++;
        }
    }
};

static pool *const the_pool = new pool;

void
run_grid(const launch_t &launch)
{
    std::mutex lock;
    std::condition_variable changed;
    unsigned num_left = launch.grid_dim.x;

    for (unsigned i = 0; i < launch.grid_dim.x; i++) {
        the_pool->run([&, i]() {
            run_block(launch, i);
            std::lock_guard<std::mutex> held(lock);

            num_left--;
            changed.notify_one();
        });
    }
    std::unique_lock<std::mutex> held(lock);
    changed.wait(held, [&]() { return num_left == 0; });
}

// ---- launches ----

struct allowances {
    std::mutex lock;
    std::map<const void *, shared_wish> wishes;
};

static allowances *const the_allowances = new allowances;

cudaError_t
wish_shared(const void *kernel, cudaFuncAttribute attribute, int value)
{
    std::lock_guard<std::mutex> held(the_allowances->lock);
    shared_wish *wish = &the_allowances->wishes[kernel];

    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
        wish->carveout = value;
        return cudaSuccess;
    }
    if (value < 0 || (size_t)value > DEVICE_SHARED) {
        return error(cudaErrorInvalidValue);
    }
    wish->bytes = (size_t)value;
    return cudaSuccess;
}

static shared_wish
shared_wished(const void *kernel)
{
    std::lock_guard<std::mutex> held(the_allowances->lock);

    return the_allowances->wishes[kernel];
}

// A device may hold back a kernel that divides shared memory otherwise than
// others do, and they may wait for each other then: all must be alike.
static bool
divides_alike(const shared_wish &wish)
{
    return wish.carveout == cudaSharedmemCarveoutMaxShared;
}

static uint64_t
seed()
{
    static const char *const text = getenv("EPX_EMULATOR_SEED");
    static const uint64_t value =
        text == nullptr ? 1 : strtoull(text, nullptr, 10);

    return value;
}

cudaError_t
launch(const void *function, std::function<void()> kernel, dim3 grid,
       dim3 block, size_t shared_bytes, cudaStream_t stream)
{
    static std::atomic<uint64_t> count;
    shared_wish wish = shared_wished(function);
    launch_t made;

    if (grid.x < 1 || grid.x > DEVICE_SMS || grid.y != 1 || grid.z != 1 ||
        block.x < 1 || block.x > DEVICE_THREADS || block.x % 32 != 0 ||
        block.y != 1 || block.z != 1) {
        return error(cudaErrorInvalidConfiguration);
    }
    if (shared_bytes > wish.bytes || !divides_alike(wish)) {
        return error(cudaErrorInvalidValue);
    }
    if (device_of(stream) != current_device()) {
        return error(cudaErrorInvalidResourceHandle);
    }
    made.kernel = std::move(kernel);
    made.grid_dim = grid;
    made.block_dim = block;
    made.shared_bytes = shared_bytes;
    return enqueue(stream, [=]() mutable {
        made.number = seed() << 32 ^ count++;
        run_grid(made);
    });
}

} // namespace emulator
