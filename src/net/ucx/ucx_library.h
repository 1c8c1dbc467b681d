/* SPDX-License-Identifier: MIT */
/* UCX, loaded when it is first asked for and kept: the library is built with
 * its headers, and linked with nothing of it. */
#ifndef EPX_NET_UCX_UCX_LIBRARY_H
#define EPX_NET_UCX_UCX_LIBRARY_H

#include "core/status.h"

#include <ucp/api/ucp.h>
#include <ucs/config/global_opts.h>
#include <uct/api/uct.h>

/* What is used of it.  Neither fences nor atomics are: one stops the worker for
 * all peers, the others fail over TCP where peers may fail. */
#define EPX__UCX_FUNCTIONS(X)         \
    X(ucp_get_version)                \
    X(ucp_init_version)               \
    X(ucp_cleanup)                    \
    X(ucp_context_query)              \
    X(ucp_config_read)                \
    X(ucp_config_modify)              \
    X(ucp_config_release)             \
    X(ucp_worker_create)              \
    X(ucp_worker_destroy)             \
    X(ucp_worker_get_address)         \
    X(ucp_worker_release_address)     \
    X(ucp_worker_get_efd)             \
    X(ucp_worker_arm)                 \
    X(ucp_worker_progress)            \
    X(ucp_worker_set_am_recv_handler) \
    X(ucp_ep_create)                  \
    X(ucp_ep_close_nbx)               \
    X(ucp_am_send_nbx)                \
    X(ucp_am_recv_data_nbx)           \
    X(ucp_mem_map)                    \
    X(ucp_mem_unmap)                  \
    X(ucp_rkey_pack)                  \
    X(ucp_rkey_buffer_release)        \
    X(ucp_ep_rkey_unpack)             \
    X(ucp_rkey_destroy)               \
    X(ucp_put_nbx)                    \
    X(ucp_ep_flush_nbx)               \
    X(ucp_request_free)               \
    X(uct_query_components)           \
    X(uct_release_component_list)     \
    X(uct_component_query)            \
    X(uct_md_config_read)             \
    X(uct_config_release)             \
    X(uct_md_open)                    \
    X(uct_md_query)                   \
    X(uct_md_close)                   \
    X(ucs_status_string)              \
    X(ucs_global_opts_set_value)

typedef struct epx__ucx_library {
#define EPX__UCX_MEMBER(name) __typeof__(&name) name;
    EPX__UCX_FUNCTIONS(EPX__UCX_MEMBER)
#undef EPX__UCX_MEMBER
} epx__ucx_library_t;

/* EPX_ERR_UNSUPPORTED where there is no UCX 1.13 or later. */
epx_status_t epx__ucx_library(const epx__ucx_library_t **library_p);

/* Once it is loaded, and before a context is made whose puts may be from and to
 * cards.  It counts for the process. */
void epx__ucx_expect_card(void);

#endif
