// SPDX-License-Identifier: MIT
#include "emulator/block.h"

#include "emulator/copies.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace emulator
{

__thread thread *self;

static constexpr size_t STACK_BYTES = 64 << 10;
static constexpr size_t SHARED_BYTES = 256 << 10; // more than a block may have
static constexpr size_t SHARED_ALIGN = 128;
static constexpr int GARBAGE = 0xa5;

block::block() = default;
block::~block() = default;

void
fail(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, format, args);
    if (self != nullptr) {
        fprintf(stderr, " (thread %u of %u, block %u of %u)", self->index.x,
                self->block->launch->block_dim.x, self->block->index.x,
                self->block->launch->grid_dim.x);
    }
    fprintf(stderr, "\n");
    va_end(args);
    abort();
}

// ---- what an OS thread keeps for its blocks ----

static char *
map_memory(size_t bytes)
{
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (memory == MAP_FAILED) {
        fail("no memory for a block");
    }
    return static_cast<char *>(memory);
}

// A thread of one kernel after the other.
static void
fiber_body()
{
    for (;;) {
        thread *now = self;

        now->block->launch->kernel();
        if (now->num_unread > 0) {
            fail("a thread leaves %u bulk stores behind that it has not waited "
                 "for",
                 now->num_unread);
        }
        now->state = LEFT;
        now->block->num_left++;
        fiber_switch(now->fiber, &now->block->scheduler);
    }
}

struct worker {
    std::vector<std::unique_ptr<fiber>> fibers;
    char *shared; // ends where nobody may write
    char *dynamic = nullptr;

    worker()
    {
        shared = map_memory(SHARED_BYTES + STACK_BYTES);
        (void)mprotect(shared + SHARED_BYTES, STACK_BYTES, PROT_NONE);
    }
    ~worker()
    {
        (void)munmap(shared, SHARED_BYTES + STACK_BYTES);
        for (const auto &it : fibers) {
            (void)munmap(it->stack, STACK_BYTES);
        }
    }
    fiber *fiber_of(size_t thread)
    {
        while (fibers.size() <= thread) {
            fibers.push_back(std::make_unique<fiber>());
            fiber_make(fibers.back().get(), map_memory(STACK_BYTES),
                       STACK_BYTES, fiber_body);
        }
        return fibers[thread].get();
    }
    void open_shared(size_t bytes)
    {
        size_t rounded =
            (bytes + SHARED_ALIGN - 1) / SHARED_ALIGN * SHARED_ALIGN;

        dynamic = shared + SHARED_BYTES - rounded;
        memset(dynamic, GARBAGE, rounded);
    }
};

static thread_local worker own_worker;

char *
dynamic_shared()
{
    return own_worker.dynamic;
}

// ---- waiting ----

void
pause(emulator::state state)
{
    self->state = state;
    fiber_switch(self->fiber, &self->block->scheduler);
}

void
look_at(const void *word)
{
    if (self->seen == word) {
        pause(SPINS);
    } else if (self->block->random.one_in(32)) {
        pause(RUNS);
    }
    self->seen = word;
    self->block->copies->put_word(word);
}

// False for the last of `count`, who goes on at once.  Those who have left are
// waited for in vain.
static bool
arrive(meeting *met, const char *what, unsigned count)
{
    if (met->arrived == 0) {
        met->what = what;
        met->all = true;
        met->any = false;
    }
    if (met->what != what) {
        fail("%s meets %s", what, met->what);
    }
    if (++met->arrived < count) {
        return true;
    }
    met->arrived = 0;
    met->turn++;
    return false;
}

static void
release(thread *first, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        first[i].state = RUNS;
    }
}

const uint64_t *
meet_warp(const char *what, uint32_t mask, uint64_t value)
{
    block *here = self->block;
    unsigned number = self->index.x / 32;
    warp *met = &here->warps[number];
    uint64_t *values = met->values[met->met.turn % 2];

    if (mask != ~0u) {
        fail("%s with the mask %#x, which is not emulated", what, mask);
    }
    values[self->index.x % 32] = value;
    if (arrive(&met->met, what, 32)) {
        pause(WAITS);
    } else {
        release(&here->threads[number * 32], 32);
    }
    return values;
}

verdict
meet_block(const char *what, bool value)
{
    block *here = self->block;
    unsigned count = (unsigned)here->threads.size();
    unsigned turn = here->met.turn % 2;
    bool waits = arrive(&here->met, what, count);

    here->met.all = here->met.all && value;
    here->met.any = here->met.any || value;
    if (waits) {
        pause(WAITS);
    } else {
        here->verdicts[turn] = { here->met.all, here->met.any };
        release(here->threads.data(), count);
    }
    return here->verdicts[turn];
}

// ---- taking turns ----

// Lets the threads of a warp run that can; notes whether any ran, and whether
// any did more than look.
static void
run_warp(block *here, unsigned number, bool *ran_p, bool *moved_p)
{
    unsigned first = here->random.below(32);
    unsigned step = here->random.one_in(2) ? 1 : 31;

    for (unsigned i = 0; i < 32; i++) {
        thread *next = &here->threads[number * 32 + (first + i * step) % 32];

        if (next->state != RUNS && next->state != SPINS) {
            continue;
        }
        next->state = RUNS;
        self = next;
        fiber_switch(&here->scheduler, next->fiber);
        self = nullptr;
        *ran_p = true;
        *moved_p = *moved_p || next->state != SPINS;
    }
}

// Other blocks are to move first.
static void
let_others_run(unsigned idle_rounds)
{
    if (idle_rounds < 8) {
        (void)sched_yield();
    } else {
        (void)usleep(idle_rounds < 64 ? 20 : 200);
    }
}

static void
describe_deadlock(block *here)
{
    for (auto &it : here->threads) {
        const meeting &met = here->warps[it.index.x / 32].met;

        if (it.state == WAITS) {
            self = &it;
            fail("all threads wait for others, of which %u have left, this one "
                 "at %s",
                 here->num_left, met.arrived > 0 ? met.what : here->met.what);
        }
    }
}

static void
run_threads(block *here)
{
    unsigned num_warps = (unsigned)here->warps.size(), idle_rounds = 0;

    while (here->num_left < here->threads.size()) {
        unsigned first = here->random.below(num_warps);
        bool ran = false, moved = false;

        for (unsigned i = 0; i < num_warps; i++) {
            // Some fall behind.
            if (here->random.one_in(8)) {
                ran = true;
                continue;
            }
            run_warp(here, (first + i) % num_warps, &ran, &moved);
            moved = here->copies->advance(&here->random) || moved;
        }
        if (!ran && !moved) {
            describe_deadlock(here);
        }
        idle_rounds = moved ? 0 : idle_rounds + 1;
        if (idle_rounds > 0) {
            let_others_run(idle_rounds);
        }
    }
}

static void
open_threads(block *here)
{
    for (unsigned i = 0; i < here->threads.size(); i++) {
        here->threads[i] = {};
        here->threads[i].index = { i, 0, 0 };
        here->threads[i].block = here;
        here->threads[i].fiber = own_worker.fiber_of(i);
    }
}

void
run_block(const launch_t &launch, unsigned index)
{
    block here;

    here.index = { index, 0, 0 };
    here.launch = &launch;
    here.random = random_of(launch.number, index);
    here.threads.resize(launch.block_dim.x);
    here.warps.resize(launch.block_dim.x / 32);
    here.met = {};
    here.num_left = 0;
    here.copies = std::make_unique<copies>();
    here.copies->are_late = here.random.one_in(2);
    own_worker.open_shared(launch.shared_bytes);
    open_threads(&here);
    if (here.random.one_in(8)) {
        (void)usleep(here.random.below(500));
    }
    run_threads(&here);
    here.copies->finish();
    for (const thread &it : here.threads) {
        if (!fiber_fits(it.fiber)) {
            fail("thread %u has used all of its stack", it.index.x);
        }
    }
}

} // namespace emulator
