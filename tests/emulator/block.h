/* SPDX-License-Identifier: MIT */
/*
 * A block of threads of a kernel.  It has an OS thread of its own, so that
 * blocks of several ranks, which wait for each other, run at the same time; its
 * threads are fibers there, which run until they have to wait.  They come in
 * the order of their warps that a seed draws, and no lane waits for another one
 * of its warp but where the kernel says so.
 *
 * A kernel that does what CUDA forbids ends the program with a sentence: lanes
 * or threads that meet at different places, or with some that have left; a
 * block whose threads all wait; bulk copies that are not waited for.
 */
#ifndef EMULATOR_BLOCK_H
#define EMULATOR_BLOCK_H

#include "emulator/fiber.h"
#include "emulator/random.h"

#include <functional>
#include <memory>
#include <stdint.h>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;

    constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1)
        : x(width), y(height), z(depth)
    {
    }
};

namespace emulator
{

struct launch_t {
    std::function<void()> kernel; /* by each thread */
    dim3 grid_dim, block_dim;
    size_t shared_bytes;
    uint64_t number; /* for what is drawn */
};

struct block;
struct copies;

enum state {
    RUNS,
    SPINS, /* looks at the same word again and again */
    WAITS, /* for others of its block */
    LEFT,
};

struct thread {
    uint3 index;
    emulator::block *block;
    emulator::fiber *fiber;
    emulator::state state;
    const void *seen;     /* where it looked last */
    uint64_t num_commits; /* of bulk stores */
    uint32_t num_unread;  /* bulk stores that have yet to read */
};

/* Who meets: a warp or the block. */
struct meeting {
    const char *what;
    unsigned arrived, turn;
    bool all, any;
};

struct warp {
    meeting met;
    uint64_t values[2][32]; /* of this turn and the last one */
};

struct verdict {
    bool all, any;
};

struct block {
    uint3 index;
    const launch_t *launch;
    emulator::random random;
    std::vector<thread> threads;
    std::vector<warp> warps;
    meeting met;
    verdict verdicts[2]; /* of this turn and the last one */
    unsigned num_left;
    fiber scheduler;
    std::unique_ptr<emulator::copies> copies;

    block();
    ~block();
};

/* The thread that runs. */
extern __thread thread *self;

/* Run a block to its end. */
void run_block(const launch_t &launch, unsigned index);

/* All lanes or threads call these, with what they bring; what the lanes have
 * brought lasts until they meet again. */
const uint64_t *meet_warp(const char *what, uint32_t mask, uint64_t value);
verdict meet_block(const char *what, bool value);

/* Before each look at a word that others write: others may come first. */
void look_at(const void *word);

/* Let others run; SPINS when there is nothing to do but wait for them. */
void pause(emulator::state state);

/* The block's shared memory, in the size that the launch asked for. */
char *dynamic_shared();

/* The kernel is wrong: ends the program. */
[[noreturn]] void fail(const char *format, ...)
    __attribute__((format(printf, 1, 2)));

} // namespace emulator

#endif
