/* SPDX-License-Identifier: MIT */
/* NCCL, as much of its interface as is used; it is loaded when it is asked for,
 * and neither it nor its header is needed to build. */
#ifndef EPX_BENCH_NCCL_LIBRARY_H
#define EPX_BENCH_NCCL_LIBRARY_H

#include "bench_error.h"

#include <epx/epx.h>
#include <stddef.h>

/* Results are 0 for success. */
#define BENCH_NCCL_INT8 0

struct bench_nccl_id {
    char bytes[128];
};

struct bench_nccl_library {
    int (*ncclGetUniqueId)(struct bench_nccl_id *id_p);
    int (*ncclCommInitRank)(void **comm_p, int num_ranks,
                            struct bench_nccl_id id, int rank);
    int (*ncclCommDestroy)(void *comm);
    int (*ncclGroupStart)(void);
    int (*ncclGroupEnd)(void);
    int (*ncclSend)(const void *from, size_t count, int dtype, int peer,
                    void *comm, epx_stream_t stream);
    int (*ncclRecv)(void *to, size_t count, int dtype, int peer, void *comm,
                    epx_stream_t stream);
    const char *(*ncclGetErrorString)(int result);
};

/* It stays loaded: CUDA may call it after all that was made with it is gone. */
bool bench_nccl_load(struct bench_nccl_library *library,
                     struct bench_error *error);

#endif
