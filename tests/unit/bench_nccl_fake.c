/* SPDX-License-Identifier: MIT */
/* In NCCL's place: copies between threads of a process, and refuses what does
 * not match. */
#include "bench_nccl_library.h"

#include <pthread.h>
#include <string.h>

#define MAX_RANKS 8

enum result {
    OK,
    NO_MATCH,
    WRONG_ID,
    OVERLAP,
};

struct transfer {
    const char *from;
    char *to;
    size_t bytes;
};

static const struct bench_nccl_id the_id = { "of the fake" };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t all;
static int ranks; /* that are there; all of them between two barriers */
static int members[MAX_RANKS];
static struct transfer sends[MAX_RANKS][MAX_RANKS];
static struct transfer receives[MAX_RANKS][MAX_RANKS];
static size_t moved[MAX_RANKS][MAX_RANKS];
static _Thread_local int own;

EPX_API int ncclGetUniqueId(struct bench_nccl_id *id_p);
EPX_API int ncclCommInitRank(void **comm_p, int num_ranks,
                             struct bench_nccl_id id, int rank);
EPX_API int ncclCommDestroy(void *comm);
EPX_API int ncclGroupStart(void);
EPX_API int ncclGroupEnd(void);
EPX_API int ncclSend(const void *from, size_t count, int dtype, int peer,
                     void *comm, epx_stream_t stream);
EPX_API int ncclRecv(void *to, size_t count, int dtype, int peer, void *comm,
                     epx_stream_t stream);
EPX_API const char *ncclGetErrorString(int result);
/* Bytes that have come since it was asked last. */
EPX_API size_t nccl_fake_moved(int from, int to);

int
ncclGetUniqueId(struct bench_nccl_id *id_p)
{
    *id_p = the_id;
    return OK;
}

int
ncclCommInitRank(void **comm_p, int num_ranks, struct bench_nccl_id id,
                 int rank)
{
    if (memcmp(&id, &the_id, sizeof id)) {
        return WRONG_ID;
    }
    pthread_mutex_lock(&lock);
    if (ranks++ == 0) {
        pthread_barrier_init(&all, NULL, (unsigned)num_ranks);
    }
    pthread_mutex_unlock(&lock);
    own = rank;
    members[rank] = rank;
    *comm_p = &members[rank];
    pthread_barrier_wait(&all);
    return OK;
}

int
ncclCommDestroy(void *comm)
{
    (void)comm;
    pthread_barrier_wait(&all);
    pthread_mutex_lock(&lock);
    ranks--;
    pthread_mutex_unlock(&lock);
    return OK;
}

int
ncclGroupStart(void)
{
    return OK;
}

int
ncclSend(const void *from, size_t count, int dtype, int peer, void *comm,
         epx_stream_t stream)
{
    (void)stream;
    sends[*(int *)comm][peer] =
        (struct transfer){ .from = from, .bytes = count };
    return dtype == BENCH_NCCL_INT8 ? OK : NO_MATCH;
}

int
ncclRecv(void *to, size_t count, int dtype, int peer, void *comm,
         epx_stream_t stream)
{
    (void)stream;
    receives[*(int *)comm][peer] =
        (struct transfer){ .to = to, .bytes = count };
    return dtype == BENCH_NCCL_INT8 ? OK : NO_MATCH;
}

/* Whether none of a rank's transfers lies in another. */
static int
are_apart(const struct transfer *of, int receives_them)
{
    for (int a = 0; a < ranks; a++) {
        const char *first = receives_them ? of[a].to : of[a].from;
        for (int b = 0; b < ranks; b++) {
            const char *second = receives_them ? of[b].to : of[b].from;
            if (a != b && of[a].bytes && of[b].bytes && first <= second &&
                second < first + of[a].bytes) {
                return 0;
            }
        }
    }
    return 1;
}

int
ncclGroupEnd(void)
{
    int result = OK;
    pthread_barrier_wait(&all);
    if (!are_apart(sends[own], 0) || !are_apart(receives[own], 1)) {
        result = OVERLAP;
    }
    pthread_barrier_wait(&all);
    for (int r = 0; r < ranks; r++) {
        struct transfer *receive = &receives[own][r];
        struct transfer *send = &sends[r][own];
        if (receive->bytes != send->bytes) {
            result = NO_MATCH;
        } else if (receive->bytes) {
            memcpy(receive->to, send->from, receive->bytes);
            moved[r][own] += receive->bytes;
        }
        *receive = (struct transfer){ 0 };
        *send = (struct transfer){ 0 };
    }
    pthread_barrier_wait(&all);
    return result;
}

const char *
ncclGetErrorString(int result)
{
    static const char *const words[] = { "nothing", "no match", "another id",
                                         "an overlap" };
    return words[result];
}

size_t
nccl_fake_moved(int from, int to)
{
    size_t bytes = moved[from][to];
    moved[from][to] = 0;
    return bytes;
}
