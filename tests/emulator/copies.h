/* SPDX-License-Identifier: MIT */
/*
 * Asynchronous bulk copies of a block, and the barriers in shared memory that
 * count their bytes.  A copy happens at any time between its start and the end
 * of the wait for it, often as late as can be: until then a load's destination
 * is garbage, and a store reads its source, and later writes, what is there by
 * then.
 */
#ifndef EMULATOR_COPIES_H
#define EMULATOR_COPIES_H

#include "emulator/block.h"

namespace emulator
{

struct bulk_load_t {
    char *to;
    const char *from;
    uint32_t bytes;
    uint64_t *barrier;
};

struct bulk_store_t {
    thread *owner;
    uint64_t group; /* the owner's commits before it */
    char *to;
    const char *from;
    uint32_t bytes;
    bool has_read;
    std::vector<char> read;
};

struct copies {
    std::vector<bulk_load_t> loads;
    std::vector<bulk_store_t> stores;

    /* Between two threads' turns: some copy may get on; true if one did. */
    bool advance(emulator::random *random);
    /* The block has ended. */
    void finish();

    void load(size_t i);
    void read(size_t i);
    void write(size_t i);
};

/* By the thread that runs: see engine/cuda/cuda_ptx.cuh. */
void barrier_init(uint64_t *barrier, uint32_t arrivals);
void barrier_arrive_expect(uint64_t *barrier, uint32_t bytes);
void barrier_wait(uint64_t *barrier, uint32_t parity);
void start_load(void *to_shared, const void *from, uint32_t bytes,
                uint64_t *barrier);
void start_store(void *to, const void *from_shared, uint32_t bytes);
void commit_stores();
void wait_stores(unsigned groups_left, bool written);

} // namespace emulator

#endif
