/* SPDX-License-Identifier: MIT */
/* UCX, loaded when it is asked for, so that epx-bench runs without it; and what
 * EPX sets of it. */
#ifndef EPX_BENCH_UCX_LIBRARY_H
#define EPX_BENCH_UCX_LIBRARY_H

#include "bench_error.h"

#include <ucp/api/ucp.h>

#define BENCH_UCX_FUNCTIONS(X)        \
    X(ucp_get_version)                \
    X(ucp_init_version)               \
    X(ucp_cleanup)                    \
    X(ucp_config_read)                \
    X(ucp_config_modify)              \
    X(ucp_config_release)             \
    X(ucp_worker_create)              \
    X(ucp_worker_destroy)             \
    X(ucp_worker_get_address)         \
    X(ucp_worker_release_address)     \
    X(ucp_worker_progress)            \
    X(ucp_worker_set_am_recv_handler) \
    X(ucp_mem_map)                    \
    X(ucp_mem_unmap)                  \
    X(ucp_rkey_pack)                  \
    X(ucp_rkey_buffer_release)        \
    X(ucp_ep_rkey_unpack)             \
    X(ucp_rkey_destroy)               \
    X(ucp_ep_create)                  \
    X(ucp_ep_close_nbx)               \
    X(ucp_ep_flush_nbx)               \
    X(ucp_am_send_nbx)                \
    X(ucp_am_recv_data_nbx)           \
    X(ucp_put_nbx)                    \
    X(ucp_request_free)               \
    X(ucs_status_string)

struct bench_ucx_library {
#define BENCH_UCX_MEMBER(name) __typeof__(&name) name;
    BENCH_UCX_FUNCTIONS(BENCH_UCX_MEMBER)
#undef BENCH_UCX_MEMBER
};

bool bench_ucx_load(struct bench_ucx_library *library,
                    struct bench_error *error);

/* A context on this device with EPX's settings, where the environment has
 * none. */
bool bench_ucx_context(const struct bench_ucx_library *library,
                       const char *device, ucp_context_h *context_p,
                       struct bench_error *error);

#endif
