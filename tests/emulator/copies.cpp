// SPDX-License-Identifier: MIT
#include "emulator/copies.h"

#include <string.h>

namespace emulator
{

// What a barrier's 8 bytes hold here.
struct barrier_t {
    uint16_t arrivals; // of a phase
    uint16_t missing;  // of them, in this phase
    int32_t bytes : 31;
    uint32_t parity : 1; // of this phase
};
static_assert(sizeof(barrier_t) == sizeof(uint64_t), "as CUDA's");

static constexpr int MOST_LOOKS = 1 << 16;

static barrier_t *
barrier_at(uint64_t *word)
{
    return reinterpret_cast<barrier_t *>(word);
}

static void
end_phase(barrier_t *barrier)
{
    if (barrier->missing == 0 && barrier->bytes == 0) {
        barrier->missing = barrier->arrivals;
        barrier->parity ^= 1;
    }
}

void
barrier_init(uint64_t *word, uint32_t arrivals)
{
    *barrier_at(word) = { (uint16_t)arrivals, (uint16_t)arrivals, 0, 0 };
}

void
barrier_arrive_expect(uint64_t *word, uint32_t bytes)
{
    barrier_t *barrier = barrier_at(word);

    if (barrier->missing == 0) {
        fail("an arrival at a barrier that waits for none");
    }
    barrier->bytes += (int32_t)bytes;
    barrier->missing--;
    end_phase(barrier);
}

void
barrier_wait(uint64_t *word, uint32_t parity)
{
    copies *all = self->block->copies.get();

    for (int looks = 0; barrier_at(word)->parity == parity; looks++) {
        size_t count = all->loads.size(), i;
        size_t first =
            count == 0 ? 0 : self->block->random.below((uint32_t)count);

        if (looks == MOST_LOOKS) {
            fail("a thread waits for a barrier that misses %u arrivals and %d "
                 "bytes",
                 barrier_at(word)->missing, (int)barrier_at(word)->bytes);
        }
        for (i = 0; i < count; i++) {
            if (all->loads[(first + i) % count].barrier == word) {
                break;
            }
        }
        if (i < count && self->block->random.one_in(2)) {
            all->load((first + i) % count);
        } else {
            pause(i < count ? RUNS : SPINS);
        }
    }
}

static void
check(const char *what, const void *global, const void *shared, uint32_t bytes)
{
    if (((uintptr_t)global | (uintptr_t)shared | bytes) % 16 != 0 ||
        bytes == 0) {
        fail("a bulk %s of %u bytes between %p and %p of shared memory: "
             "multiples of 16 are needed",
             what, bytes, global, shared);
    }
}

void
start_load(void *to_shared, const void *from, uint32_t bytes, uint64_t *barrier)
{
    check("load", from, to_shared, bytes);
    memset(to_shared, 0xb6, bytes);
    self->block->copies->loads.push_back({ static_cast<char *>(to_shared),
                                           static_cast<const char *>(from),
                                           bytes, barrier });
}

void
start_store(void *to, const void *from_shared, uint32_t bytes)
{
    check("store", to, from_shared, bytes);
    self->block->copies->stores.push_back(
        { self,
          self->num_commits,
          static_cast<char *>(to),
          static_cast<const char *>(from_shared),
          bytes,
          false,
          {} });
    self->num_unread++;
}

void
commit_stores()
{
    self->num_commits++;
}

void
wait_stores(unsigned groups_left, bool written)
{
    copies *all = self->block->copies.get();

    for (size_t i = all->stores.size(); i-- > 0;) {
        const bulk_store_t &store = all->stores[i];

        if (store.owner != self ||
            store.group + groups_left >= self->num_commits) {
            continue;
        }
        if (!store.has_read) {
            all->read(i);
        }
        if (written) {
            all->write(i);
        }
    }
}

void
put_relaxed(uint64_t *word, uint64_t value, bool adds)
{
    copies *all = self->block->copies.get();

    all->put_word(word);
    all->words.push_back({ word, value, adds });
    if (!self->block->random.one_in(4)) {
        all->put(all->words.size() - 1);
    }
}

void
fence()
{
    self->block->copies->put_words();
    __atomic_thread_fence(__ATOMIC_ACQ_REL);
}

// ---- copying ----

template <typename Copy>
static void
drop(std::vector<Copy> *list, size_t i)
{
    if (i + 1 < list->size()) {
        (*list)[i] = std::move(list->back());
    }
    list->pop_back();
}

void
copies::load(size_t i)
{
    bulk_load_t done = loads[i];
    barrier_t *barrier = barrier_at(done.barrier);

    memcpy(done.to, done.from, done.bytes);
    barrier->bytes -= (int32_t)done.bytes;
    end_phase(barrier);
    drop(&loads, i);
}

void
copies::read(size_t i)
{
    stores[i].read.assign(stores[i].from, stores[i].from + stores[i].bytes);
    stores[i].has_read = true;
    stores[i].owner->num_unread--;
}

void
copies::write(size_t i)
{
    memcpy(stores[i].to, stores[i].read.data(), stores[i].bytes);
    drop(&stores, i);
}

void
copies::put(size_t i)
{
    late_word_t late = words[i];

    if (late.adds) {
        (void)__atomic_fetch_add(late.word, late.value, __ATOMIC_RELAXED);
    } else {
        __atomic_store_n(late.word, late.value, __ATOMIC_RELAXED);
    }
    drop(&words, i);
}

void
copies::put_word(const void *word)
{
    for (size_t i = words.size(); i-- > 0;) {
        if (words[i].word == word) {
            put(i);
        }
    }
}

void
copies::put_words()
{
    while (!words.empty()) {
        put(words.size() - 1);
    }
}

bool
copies::advance(emulator::random *random)
{
    if (!words.empty() && random->one_in(4)) {
        put(random->below((uint32_t)words.size()));
        return true;
    }
    if (are_late) {
        return false;
    }
    if (!loads.empty() && random->one_in(4)) {
        load(random->below((uint32_t)loads.size()));
        return true;
    }
    if (!stores.empty() && random->one_in(4)) {
        size_t i = random->below((uint32_t)stores.size());

        if (stores[i].has_read) {
            write(i);
        } else {
            read(i);
        }
        return true;
    }
    return false;
}

void
copies::finish()
{
    if (!loads.empty()) {
        fail("a block leaves %zu bulk loads of %u bytes and more behind",
             loads.size(), loads[0].bytes);
    }
    while (!stores.empty()) {
        write(stores.size() - 1);
    }
    put_words();
}

} // namespace emulator
