/* SPDX-License-Identifier: MIT */
/*
 * What a block has begun and not yet done.
 *
 * Asynchronous bulk copies, and the barriers in shared memory that count their
 * bytes: a copy happens at any time between its start and the end of the wait
 * for it, often as late as can be.  Until then a load's destination is garbage,
 * and a store reads its source, and later writes, what is there by then.
 *
 * Relaxed stores and additions: each may come after later ones to other words,
 * up to the block's next fence.
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

struct late_word_t {
    uint64_t *word;
    uint64_t value;
    bool adds;
};

struct copies {
    bool are_late; /* none before it must be */
    std::vector<bulk_load_t> loads;
    std::vector<bulk_store_t> stores;
    std::vector<late_word_t> words;

    /* Between two threads' turns: some copy may get on; true if one did. */
    bool advance(emulator::random *random);
    /* The block has ended. */
    void finish();

    void load(size_t i);
    void read(size_t i);
    void write(size_t i);
    void put(size_t i);
    /* Those to one word, or all of them. */
    void put_word(const void *word);
    void put_words();
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
void put_relaxed(uint64_t *word, uint64_t value, bool adds);
void fence();

} // namespace emulator

#endif
