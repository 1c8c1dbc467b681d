/* SPDX-License-Identifier: MIT */
#include "sim_card.h"

#include "emulator/flush.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What has been put to a card, whose kernels do not see it yet. */
typedef struct unseen {
    struct unseen *next;
    uint64_t address;
    uint64_t bytes;
    unsigned char payload[];
} unseen_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unseen_t *first; /* the oldest */
static unseen_t **last = &first;

static void
forget(bool shows)
{
    (void)pthread_mutex_lock(&lock);
    while (first != NULL) {
        unseen_t *unseen = first;

        first = unseen->next;
        if (shows) {
            memcpy((char *)(uintptr_t)unseen->address, unseen->payload,
                   unseen->bytes);
        }
        free(unseen);
    }
    last = &first;
    (void)pthread_mutex_unlock(&lock);
}

static void
flush(void)
{
    forget(true);
}

void
sim_card_use(bool is_used)
{
    forget(false);
    emulator_on_flush(is_used ? flush : NULL);
}

static enum cudaMemoryType
type_of(uint64_t address)
{
    struct cudaPointerAttributes is = { cudaMemoryTypeUnregistered, 0 };

    (void)cudaPointerGetAttributes(&is, (const void *)(uintptr_t)address);
    return is.type;
}

void
sim_card_check(const void *memory, bool is_on_card)
{
    enum cudaMemoryType type = type_of((uint64_t)(uintptr_t)memory);

    if ((type == cudaMemoryTypeDevice) != is_on_card) {
        (void)fprintf(stderr, "memory at %p is of type %d, said to be %s\n",
                      memory, (int)type,
                      is_on_card ? "a card's" : "the host's");
        abort();
    }
}

bool
sim_card_put(uint64_t address, const char *from, uint64_t bytes,
             bool is_from_card)
{
    enum cudaMemoryType type = type_of(address);
    unseen_t *unseen;

    if (is_from_card && type == cudaMemoryTypeUnregistered) {
        (void)fprintf(stderr, "rows of a card were put into a box\n");
        abort();
    }
    if (type != cudaMemoryTypeDevice) {
        return false;
    }
    unseen = malloc(sizeof(*unseen) + bytes);
    *unseen = (unseen_t){ .address = address, .bytes = bytes };
    memcpy(unseen->payload, from, bytes);
    (void)pthread_mutex_lock(&lock);
    *last = unseen;
    last = &unseen->next;
    (void)pthread_mutex_unlock(&lock);
    return true;
}
