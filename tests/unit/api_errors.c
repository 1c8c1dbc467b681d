/* SPDX-License-Identifier: MIT */
/* Every misuse has its own status and a sentence with the value, changes
 * nothing, and the corrected call works. */
#include "api_common.h"
#include <stdlib.h>

enum { HIDDEN = 16, ROWS = 8 };

/* ---- plain functions ---- */

static void
functions_without_state(void **state)
{
    int32_t first;
    int32_t count;

    (void)state;
    assert_int_equal(epx_dtype_size(EPX_F32), 4);
    assert_int_equal(epx_dtype_size(EPX_BYTES), 1);
    assert_int_equal(epx_dtype_size((epx_dtype_t)0), 0);
    assert_int_equal(epx_dtype_size((epx_dtype_t)99), 0);
    assert_string_equal(epx_status_string(EPX_OK), "success");
    assert_string_equal(epx_status_string(EPX_ERR_SHAPE),
                        "a shape is not possible here");
    assert_non_null(epx_status_string((epx_status_t)-12345));

    WORKS(epx_local_experts(10, 4, 1, &first, &count));
    assert_int_equal(first, 3);
    assert_int_equal(count, 3);
    WORKS(epx_local_experts(10, 4, 2, &first, &count));
    assert_int_equal(first, 6);
    assert_int_equal(count, 2);
    WORKS(epx_local_experts(2, 4, 3, &first, &count));
    assert_int_equal(first, 2);
    assert_int_equal(count, 0);
    REFUSED(epx_local_experts(0, 4, 1, &first, &count), EPX_ERR_INVALID, "0");
    REFUSED(epx_local_experts(10, -7, 1, &first, &count), EPX_ERR_INVALID,
            "-7");
    REFUSED(epx_local_experts(10, 4, 4, &first, &count), EPX_ERR_INVALID, "4");
    REFUSED(epx_local_experts(10, 4, -1, &first, &count), EPX_ERR_INVALID,
            "-1");
    REFUSED(epx_local_experts(10, 4, 1, NULL, &count), EPX_ERR_NULL, "first");
    REFUSED(epx_local_experts(10, 4, 1, &first, NULL), EPX_ERR_NULL, "count");
}

static void
null_is_allowed_where_documented(void **state)
{
    (void)state;
    epx_bootstrap_destroy(NULL);
    WORKS(epx_group_destroy(NULL));
    WORKS(epx_plan_destroy(NULL));
    WORKS(epx_queue_destroy(NULL));
}

static void
bootstrap_of_threads(void **state)
{
    epx_bootstrap_t *bootstraps[2];

    (void)state;
    REFUSED(epx_bootstrap_threads_create(0, bootstraps), EPX_ERR_INVALID, "0");
    REFUSED(epx_bootstrap_threads_create(-3, bootstraps), EPX_ERR_INVALID,
            "-3");
    REFUSED(epx_bootstrap_threads_create(1025, bootstraps), EPX_ERR_INVALID,
            "1025");
    REFUSED(epx_bootstrap_threads_create(2, NULL), EPX_ERR_NULL, "null");
}

/* ---- group ---- */

#define CONFIG_WITH(field, value, status, word)                    \
    do {                                                           \
        epx_group_config_t bad = config;                           \
        epx_group_t *untouched = (epx_group_t *)&config;           \
                                                                   \
        bad.field = value;                                         \
        REFUSED(epx_group_create(&bad, &untouched), status, word); \
    } while (0)

#define BOOTSTRAP_WITH(field, value, status, word)            \
    do {                                                      \
        epx_bootstrap_t bad_bootstrap = *bootstrap;           \
                                                              \
        bad_bootstrap.field = value;                          \
        CONFIG_WITH(bootstrap, &bad_bootstrap, status, word); \
    } while (0)

#define NETWORK_WITH(field, value, status, word)                \
    do {                                                        \
        epx_network_config_t network = EPX_NETWORK_CONFIG_INIT; \
                                                                \
        network.field = value;                                  \
        CONFIG_WITH(network, &network, status, word);           \
    } while (0)

static void
network_config(void **state)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_bootstrap_t *bootstrap;
    epx_group_t *group;

    (void)state;
    WORKS(epx_bootstrap_threads_create(1, &bootstrap));
    config.bootstrap = bootstrap;
    config.heap_bytes = 1 << 20;
    NETWORK_WITH(size, 5, EPX_ERR_INVALID, "5");
    NETWORK_WITH(service_level, 16, EPX_ERR_INVALID, "16");
    NETWORK_WITH(num_lanes, 0, EPX_ERR_INVALID, "0");
    NETWORK_WITH(wire, "", EPX_ERR_INVALID, "\"\"");
    NETWORK_WITH(wire, "RMA", EPX_ERR_INVALID, "\"RMA\"");
    NETWORK_WITH(gpudirect, 2, EPX_ERR_INVALID, "2");
    NETWORK_WITH(gpudirect, -2, EPX_ERR_INVALID, "-2");
    assert_int_equal(setenv("EPX_NET_WIRE", "puts", 1), 0);
    REFUSED(epx_group_create(&config, &group), EPX_ERR_ENVIRONMENT,
            "EPX_NET_WIRE is \"puts\"");
    assert_int_equal(unsetenv("EPX_NET_WIRE"), 0);
    assert_int_equal(setenv("EPX_NET_GPUDIRECT", "yes", 1), 0);
    REFUSED(epx_group_create(&config, &group), EPX_ERR_ENVIRONMENT,
            "EPX_NET_GPUDIRECT");
    assert_int_equal(unsetenv("EPX_NET_GPUDIRECT"), 0);
    epx_bootstrap_destroy(bootstrap);
}

static void
group_config(void **state)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_bootstrap_t *bootstrap;
    epx_group_t *group;

    (void)state;
    WORKS(epx_bootstrap_threads_create(1, &bootstrap));
    config.bootstrap = bootstrap;
    config.heap_bytes = 1 << 20;
    REFUSED(epx_group_create(NULL, &group), EPX_ERR_NULL, "config");
    REFUSED(epx_group_create(&config, NULL), EPX_ERR_NULL, "group_p");
    CONFIG_WITH(device, (epx_device_t)7, EPX_ERR_UNSUPPORTED, "7");
    CONFIG_WITH(device, EPX_DEVICE_CUDA, EPX_ERR_UNSUPPORTED, "1");
    CONFIG_WITH(device_ordinal, 3, EPX_ERR_UNSUPPORTED, "3");
    CONFIG_WITH(heap_bytes, 1, EPX_ERR_INVALID, "1");
    CONFIG_WITH(timeout_ns, UINT64_MAX, EPX_ERR_INVALID,
                "18446744073709551615");
    CONFIG_WITH(lost_after_ns, 9999999, EPX_ERR_INVALID, "9999999");
    CONFIG_WITH(lost_after_ns, UINT64_MAX, EPX_ERR_INVALID,
                "18446744073709551615");
    CONFIG_WITH(num_workers, -2, EPX_ERR_INVALID, "-2");
    CONFIG_WITH(num_workers, 1000000, EPX_ERR_INVALID, "1000000");
    CONFIG_WITH(max_experts, -4, EPX_ERR_INVALID, "-4");
    CONFIG_WITH(max_experts, INT32_MAX, EPX_ERR_INVALID, "2147483647");
    CONFIG_WITH(heap_bytes, UINT64_MAX, EPX_ERR_INVALID,
                "18446744073709551615");
    BOOTSTRAP_WITH(size, 5, EPX_ERR_INVALID, "5");
    BOOTSTRAP_WITH(rank, -1, EPX_ERR_INVALID, "-1");
    BOOTSTRAP_WITH(rank, 1, EPX_ERR_INVALID, "1");
    BOOTSTRAP_WITH(num_ranks, 0, EPX_ERR_INVALID, "0");
    BOOTSTRAP_WITH(num_ranks, 1025, EPX_ERR_INVALID, "1025");
    BOOTSTRAP_WITH(allgather, NULL, EPX_ERR_NULL, "allgather");

    WORKS(epx_group_create(&config, &group));
    REFUSED(epx_group_query(NULL, &info), EPX_ERR_NULL, "group");
    REFUSED(epx_group_query(group, NULL), EPX_ERR_NULL, "info");
    REFUSED(epx_group_status(NULL), EPX_ERR_NULL, "group");
    REFUSED(epx_group_abort(NULL), EPX_ERR_NULL, "group");
    WORKS(epx_group_status(group));
    WORKS(epx_group_query(group, &info));
    assert_int_equal(info.rank, 0);
    assert_int_equal(info.num_ranks, 1);
    assert_int_equal(info.max_experts, 1024);
    assert_string_equal(info.engine, "cpu");
    assert_true(info.num_workers >= 1);
    WORKS(epx_group_destroy(group));
    epx_bootstrap_destroy(bootstrap);
}

static void
group_with_something_alive(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_queue_t *queue;
    epx_plan_t *plan;

    (void)state;
    WORKS(epx_queue_create(group, &queue));
    REFUSED(epx_group_destroy(group), EPX_ERR_STATE, "queue");
    WORKS(epx_plan_create(group, &args, queue, &plan));
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_plan_create(group, &args, NULL, &plan));
    REFUSED(epx_group_destroy(group), EPX_ERR_STATE, "plan");
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_group_destroy(group));
}

/* ---- memory ---- */

static void
memory(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_group_t *other = api_group_of_one(1 << 20);
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    uint64_t free_before;
    int outside = 0;
    void *rest;
    void *ptr;

    (void)state;
    WORKS(epx_group_query(group, &info));
    free_before = info.heap_free_bytes;
    assert_true(info.heap_bytes >= 1 << 20);
    assert_true(info.heap_largest_free_bytes <= info.heap_free_bytes);
    REFUSED(epx_mem_alloc(NULL, 64, &ptr), EPX_ERR_NULL, "group");
    REFUSED(epx_mem_alloc(group, 64, NULL), EPX_ERR_NULL, "ptr");
    REFUSED(epx_mem_alloc(group, 123456789, &ptr), EPX_ERR_HEAP_EXHAUSTED,
            "123456789");
    REFUSED(epx_mem_alloc(group, UINT64_MAX, &ptr), EPX_ERR_HEAP_EXHAUSTED,
            "18446744073709551615");
    WORKS(epx_mem_alloc(group, info.heap_largest_free_bytes, &rest));
    REFUSED(epx_mem_alloc(group, 1, &ptr), EPX_ERR_HEAP_EXHAUSTED, "1");
    WORKS(epx_mem_free(group, rest));
    WORKS(epx_mem_alloc(group, 100, &ptr));
    assert_int_equal((uintptr_t)ptr % 4096, 0);
    memset(ptr, 1, 100);
    REFUSED(epx_mem_free(other, ptr), EPX_ERR_WRONG_GROUP, "group");
    REFUSED(epx_mem_free(group, &outside), EPX_ERR_WRONG_GROUP, "group");
    REFUSED(epx_mem_free(NULL, ptr), EPX_ERR_NULL, "group");
    WORKS(epx_mem_free(group, NULL));
    WORKS(epx_mem_free(group, ptr));
    WORKS(epx_group_query(group, &info));
    assert_int_equal(info.heap_free_bytes, free_before);
    WORKS(epx_group_destroy(group));
    WORKS(epx_group_destroy(other));
}

/* ---- plan ---- */

#define PLAN_WITH(field, value, status, word)                             \
    do {                                                                  \
        epx_plan_args_t bad = good;                                       \
                                                                          \
        bad.field = value;                                                \
        REFUSED(epx_plan_create(group, &bad, NULL, &plan), status, word); \
    } while (0)

static void
plan_arguments(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t good = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_t *plan;

    (void)state;
    REFUSED(epx_plan_create(NULL, &good, NULL, &plan), EPX_ERR_NULL, "group");
    REFUSED(epx_plan_create(group, NULL, NULL, &plan), EPX_ERR_NULL, "args");
    REFUSED(epx_plan_create(group, &good, NULL, NULL), EPX_ERR_NULL, "plan_p");
    PLAN_WITH(layout, (epx_layout_t)0, EPX_ERR_INVALID, "0");
    PLAN_WITH(layout, (epx_layout_t)9, EPX_ERR_INVALID, "9");
    PLAN_WITH(num_experts, 0, EPX_ERR_INVALID, "0");
    PLAN_WITH(num_experts, -3, EPX_ERR_INVALID, "-3");
    PLAN_WITH(num_experts, 1025, EPX_ERR_INVALID, "1025");
    PLAN_WITH(topk, 0, EPX_ERR_INVALID, "0");
    PLAN_WITH(topk, 65, EPX_ERR_INVALID, "65");
    PLAN_WITH(idx_dtype, EPX_F32, EPX_ERR_DTYPE, "idx_dtype");
    PLAN_WITH(idx_dtype, (epx_dtype_t)42, EPX_ERR_DTYPE, "42");
    PLAN_WITH(num_tokens, -1, EPX_ERR_INVALID, "-1");
    PLAN_WITH(topk_idx, NULL, EPX_ERR_NULL, "topk_idx");
    PLAN_WITH(max_tokens_per_rank, -5, EPX_ERR_INVALID, "-5");
    PLAN_WITH(max_tokens_per_rank, 3, EPX_ERR_SHAPE, "4");
    PLAN_WITH(recv_capacity, -6, EPX_ERR_INVALID, "-6");
    PLAN_WITH(expert_alignment, -8, EPX_ERR_INVALID, "-8");
    PLAN_WITH(send_only_row_bytes, -9, EPX_ERR_INVALID, "-9");
    PLAN_WITH(expert_alignment, 4, EPX_ERR_SHAPE, "4");
    PLAN_WITH(send_only_row_bytes, 123456789, EPX_ERR_HEAP_EXHAUSTED, "heap");
    good.layout = EPX_LAYOUT_EXPERT_SLOTS;
    PLAN_WITH(max_tokens_per_rank, 0, EPX_ERR_SHAPE, "max_tokens_per_rank");
    PLAN_WITH(recv_capacity, 100, EPX_ERR_SHAPE, "100");
    WORKS(epx_plan_create(group, &good, NULL, &plan));
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_group_destroy(group));
}

static void
expert_indices(void **state)
{
    static const int64_t too_high[] = { 0, 1, 2, 6 };
    static const int64_t too_low[] = { 0, -2, 2, 3 };
    static const int64_t huge[] = { 0, 1, INT64_C(1) << 32, 3 };
    static const int64_t twice[] = { 0, 1, 3, 3 };
    static const int32_t narrow[] = { 0, 1, 2, 77 };
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t good = api_plan_args(EPX_LAYOUT_EXPERT_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_plan_t *plan;

    (void)state;
    good.num_tokens = 2;
    PLAN_WITH(topk_idx, too_high, EPX_ERR_EXPERT, "6");
    PLAN_WITH(topk_idx, too_low, EPX_ERR_EXPERT, "-2");
    PLAN_WITH(topk_idx, huge, EPX_ERR_EXPERT, "4294967296");
    PLAN_WITH(topk_idx, twice, EPX_ERR_EXPERT, "3");
    good.idx_dtype = EPX_I32;
    PLAN_WITH(topk_idx, narrow, EPX_ERR_EXPERT, "77");

    good.idx_dtype = EPX_I64;
    WORKS(epx_plan_create(group, &good, NULL, &plan));
    REFUSED(epx_plan_update(plan, 2, too_high, NULL), EPX_ERR_EXPERT, "6");
    REFUSED(epx_plan_update(plan, 2, twice, NULL), EPX_ERR_EXPERT, "3");
    /* The old routing is still there. */
    WORKS(epx_plan_counts(plan, &counts));
    assert_int_equal(counts.num_recv_rows, 4);
    WORKS(epx_plan_update(plan, API_TOKENS, api_topk_idx, NULL));
    WORKS(epx_plan_counts(plan, &counts));
    assert_int_equal(counts.num_recv_rows, 7);
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_group_destroy(group));
}

static void
plan_calls(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    epx_plan_t *plan;

    (void)state;
    WORKS(epx_plan_create(group, &args, NULL, &plan));
    REFUSED(epx_plan_counts(NULL, &counts), EPX_ERR_NULL, "plan");
    REFUSED(epx_plan_counts(plan, NULL), EPX_ERR_NULL, "counts");
    REFUSED(epx_plan_update(NULL, 1, api_topk_idx, NULL), EPX_ERR_NULL, "plan");
    REFUSED(epx_plan_update(plan, 1, NULL, NULL), EPX_ERR_NULL, "topk_idx");
    REFUSED(epx_plan_update(plan, -1, api_topk_idx, NULL), EPX_ERR_SHAPE, "-1");
    REFUSED(epx_plan_update(plan, 5, api_topk_idx, NULL), EPX_ERR_SHAPE, "5");
    REFUSED(epx_complete(NULL, NULL), EPX_ERR_NULL, "plan");
    REFUSED(epx_complete(plan, NULL), EPX_ERR_STATE, "send-only");
    WORKS(epx_plan_update(plan, 0, NULL, NULL));
    WORKS(epx_plan_counts(plan, &counts));
    assert_int_equal(counts.num_recv_rows, 0);
    WORKS(epx_plan_destroy(plan));

    args.max_tokens_per_rank = 0;
    args.send_only_row_bytes = 64;
    REFUSED(epx_plan_create(group, &args, NULL, &plan), EPX_ERR_SHAPE,
            "max_tokens_per_rank");
    args.send_only_row_bytes = 0;
    WORKS(epx_plan_create(group, &args, NULL, &plan));
    REFUSED(epx_plan_update(plan, 1, api_topk_idx, NULL), EPX_ERR_STATE,
            "max_tokens_per_rank");
    WORKS(epx_plan_destroy(plan));
    WORKS(epx_group_destroy(group));
}

/* ---- dispatch ---- */

/* One rank, a plan, and arguments that work; every array is in buffers. */
typedef struct fixture {
    epx_group_t *group;
    epx_plan_t *plan;
    epx_dispatch_args_t dispatch;
    epx_combine_args_t combine;
    uint16_t x[ROWS * HIDDEN];
    float weights[ROWS * API_TOPK];
    uint32_t scales[ROWS];
    struct outputs {
        uint16_t x[ROWS * HIDDEN];
        float weights[ROWS * API_TOPK];
        uint32_t scales[ROWS];
        int64_t idx[ROWS * API_TOPK];
        int32_t src[ROWS];
        int32_t counts[API_EXPERTS];
    } out;
} fixture_t;

static void
fixture_open(fixture_t *f, epx_layout_t layout, int64_t send_only_row_bytes)
{
    epx_plan_args_t args = api_plan_args(layout);

    memset(f, 0, sizeof(*f));
    memset(&f->out, 0xc7, sizeof(f->out));
    args.send_only_row_bytes = send_only_row_bytes;
    f->group = api_group_of_one(1 << 20);
    WORKS(epx_plan_create(f->group, &args, NULL, &f->plan));
    f->dispatch = (epx_dispatch_args_t)EPX_DISPATCH_ARGS_INIT;
    f->dispatch.x = f->x;
    f->dispatch.hidden = HIDDEN;
    f->dispatch.dtype = EPX_BF16;
    f->dispatch.recv_x = f->out.x;
    f->dispatch.recv_rows = ROWS;
    f->combine = (epx_combine_args_t)EPX_COMBINE_ARGS_INIT;
    f->combine.x = f->x;
    f->combine.num_rows = ROWS;
    f->combine.hidden = HIDDEN;
    f->combine.dtype = EPX_BF16;
    f->combine.out = f->out.x;
}

static void
fixture_untouched(const fixture_t *f)
{
    struct outputs before;

    memset(&before, 0xc7, sizeof(before));
    assert_memory_equal(&before, &f->out, sizeof(before));
}

static void
fixture_close(fixture_t *f)
{
    WORKS(epx_plan_destroy(f->plan));
    WORKS(epx_group_destroy(f->group));
}

#define DISPATCH_WITH(field, value, status, word)                \
    do {                                                         \
        epx_dispatch_args_t bad = f.dispatch;                    \
                                                                 \
        bad.field = value;                                       \
        REFUSED(epx_dispatch(f.plan, &bad, NULL), status, word); \
    } while (0)

static void
dispatch_arguments(void **state)
{
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    REFUSED(epx_dispatch(NULL, &f.dispatch, NULL), EPX_ERR_NULL, "plan");
    REFUSED(epx_dispatch(f.plan, NULL, NULL), EPX_ERR_NULL, "args");
    DISPATCH_WITH(x, NULL, EPX_ERR_NULL, "x");
    DISPATCH_WITH(recv_x, NULL, EPX_ERR_NULL, "recv_x");
    DISPATCH_WITH(hidden, 0, EPX_ERR_SHAPE, "0");
    DISPATCH_WITH(hidden, -16, EPX_ERR_SHAPE, "-16");
    DISPATCH_WITH(hidden, 9, EPX_ERR_SHAPE, "9");
    DISPATCH_WITH(hidden, INT64_MAX / 2 + 1, EPX_ERR_SHAPE, "hidden");
    DISPATCH_WITH(dtype, (epx_dtype_t)0, EPX_ERR_DTYPE, "0");
    DISPATCH_WITH(dtype, (epx_dtype_t)31, EPX_ERR_DTYPE, "31");
    DISPATCH_WITH(dtype, EPX_I32, EPX_ERR_DTYPE, "dtype");
    DISPATCH_WITH(dtype, EPX_I64, EPX_ERR_DTYPE, "dtype");
    DISPATCH_WITH(quantize, (epx_quantize_t)8, EPX_ERR_INVALID, "8");
    DISPATCH_WITH(quantize, EPX_QUANTIZE_LOGFMT10, EPX_ERR_INVALID, "is 4");
    DISPATCH_WITH(recv_rows, -2, EPX_ERR_SHAPE, "-2");
    DISPATCH_WITH(recv_rows, 3, EPX_ERR_TOO_SMALL, "3");
    DISPATCH_WITH(flags, 6u, EPX_ERR_INVALID, "6");
    DISPATCH_WITH(num_workers, -4, EPX_ERR_INVALID, "-4");
    DISPATCH_WITH(num_workers, 3, EPX_ERR_INVALID, "3");
    DISPATCH_WITH(topk_weights, f.weights, EPX_ERR_NULL, "recv_topk_weights");
    DISPATCH_WITH(x, (char *)f.x + 1, EPX_ERR_INVALID, "2");
    DISPATCH_WITH(recv_x, (char *)f.out.x + 1, EPX_ERR_INVALID, "2");
    DISPATCH_WITH(recv_topk_idx, (char *)f.out.idx + 4, EPX_ERR_INVALID, "8");
    fixture_untouched(&f);
    f.dispatch.recv_src_token = f.out.src;
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    assert_int_equal(f.out.src[3], 3);
    fixture_close(&f);
}

static void
dispatch_scales(void **state)
{
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    f.dispatch.scales = f.scales;
    f.dispatch.num_scales = 1;
    f.dispatch.recv_scales = f.out.scales;
    DISPATCH_WITH(num_scales, 0, EPX_ERR_SHAPE, "0");
    DISPATCH_WITH(num_scales, -1, EPX_ERR_SHAPE, "-1");
    DISPATCH_WITH(recv_scales, NULL, EPX_ERR_NULL, "recv_scales");
    DISPATCH_WITH(scale_token_stride, -3, EPX_ERR_SHAPE, "-3");
    DISPATCH_WITH(scale_stride, -3, EPX_ERR_SHAPE, "-3");
    DISPATCH_WITH(recv_scale_row_stride, -3, EPX_ERR_SHAPE, "-3");
    DISPATCH_WITH(recv_scale_stride, -3, EPX_ERR_SHAPE, "-3");
    DISPATCH_WITH(recv_scale_expert_stride, -3, EPX_ERR_SHAPE, "-3");
    fixture_untouched(&f);
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    fixture_close(&f);
}

static void
dispatch_quantize(void **state)
{
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    f.dispatch.quantize = EPX_QUANTIZE_F8E4M3_POW2;
    DISPATCH_WITH(quantize, EPX_QUANTIZE_F8E4M3_F32, EPX_ERR_NULL,
                  "recv_scales");
    f.dispatch.recv_scales = f.out.scales;
    DISPATCH_WITH(scales, f.scales, EPX_ERR_INVALID, "scales");
    DISPATCH_WITH(dtype, EPX_F16, EPX_ERR_DTYPE, "dtype");
    DISPATCH_WITH(dtype, EPX_F32, EPX_ERR_DTYPE, "dtype");
    DISPATCH_WITH(hidden, 8, EPX_ERR_SHAPE, "8"); /* 8 bytes as FP8 */
    fixture_untouched(&f);
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    fixture_close(&f);
}

static void
dispatch_in_expert_layouts(void **state)
{
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_EXPERT_MAJOR, 0);
    DISPATCH_WITH(recv_topk_idx, f.out.idx, EPX_ERR_INVALID, "recv_topk_idx");
    DISPATCH_WITH(recv_rows, 6, EPX_ERR_TOO_SMALL, "6");
    fixture_untouched(&f);
    f.dispatch.recv_rows = 7;
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    fixture_close(&f);

    fixture_open(&f, EPX_LAYOUT_EXPERT_SLOTS, 0);
    DISPATCH_WITH(recv_rows, 23, EPX_ERR_TOO_SMALL, "23"); /* 6 * 1 * 4 */
    fixture_untouched(&f);
    fixture_close(&f);
}

/* A receive buffer in EPX memory that ends too soon is seen, too. */
static void
dispatch_into_short_epx_memory(void **state)
{
    fixture_t f;
    void *block;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    WORKS(epx_mem_alloc(f.group, 4096, &block));
    DISPATCH_WITH(recv_x, (char *)block + 4096 - 100, EPX_ERR_TOO_SMALL,
                  "recv_x");
    f.dispatch.recv_x = (char *)block + 4096 - ROWS * HIDDEN * 2;
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    WORKS(epx_mem_free(f.group, block));
    fixture_close(&f);
}

/* ---- combine ---- */

#define COMBINE_WITH(field, value, status, word)                \
    do {                                                        \
        epx_combine_args_t bad = f.combine;                     \
                                                                \
        bad.field = value;                                      \
        REFUSED(epx_combine(f.plan, &bad, NULL), status, word); \
    } while (0)

static void
combine_arguments(void **state)
{
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    REFUSED(epx_combine(NULL, &f.combine, NULL), EPX_ERR_NULL, "plan");
    REFUSED(epx_combine(f.plan, NULL, NULL), EPX_ERR_NULL, "args");
    COMBINE_WITH(x, NULL, EPX_ERR_NULL, "x");
    COMBINE_WITH(out, NULL, EPX_ERR_NULL, "out");
    COMBINE_WITH(x, (char *)f.x + 1, EPX_ERR_INVALID, "2");
    COMBINE_WITH(out, (char *)f.out.x + 1, EPX_ERR_INVALID, "2");
    COMBINE_WITH(bias[1], (char *)f.x + 1, EPX_ERR_INVALID, "bias[1]");
    COMBINE_WITH(num_rows, -2, EPX_ERR_SHAPE, "-2");
    COMBINE_WITH(num_rows, 3, EPX_ERR_TOO_SMALL, "3");
    COMBINE_WITH(hidden, 0, EPX_ERR_SHAPE, "0");
    COMBINE_WITH(hidden, -8, EPX_ERR_SHAPE, "-8");
    COMBINE_WITH(hidden, 9, EPX_ERR_SHAPE, "9");
    COMBINE_WITH(hidden, INT64_MAX / 2 + 1, EPX_ERR_SHAPE, "hidden");
    COMBINE_WITH(dtype, EPX_F8E4M3, EPX_ERR_DTYPE, "dtype");
    COMBINE_WITH(dtype, EPX_BYTES, EPX_ERR_DTYPE, "dtype");
    COMBINE_WITH(dtype, (epx_dtype_t)88, EPX_ERR_DTYPE, "88");
    COMBINE_WITH(quantize, EPX_QUANTIZE_F8E4M3_F32, EPX_ERR_INVALID, "is 1");
    COMBINE_WITH(quantize, (epx_quantize_t)5, EPX_ERR_INVALID, "is 5");
    COMBINE_WITH(quantize, (epx_quantize_t)-1, EPX_ERR_INVALID, "is -1");
    for (int dtype = EPX_F32; dtype <= EPX_F16; dtype++) {
        epx_combine_args_t bad = f.combine;

        bad.quantize = EPX_QUANTIZE_LOGFMT10;
        bad.dtype = (epx_dtype_t)dtype;
        REFUSED(epx_combine(f.plan, &bad, NULL), EPX_ERR_DTYPE, "EPX_BF16");
    }
    COMBINE_WITH(topk_weights, f.weights, EPX_ERR_INVALID, "topk_weights");
    COMBINE_WITH(recv_topk_weights, f.weights, EPX_ERR_NULL,
                 "out_topk_weights");
    COMBINE_WITH(out_topk_weights, f.out.weights, EPX_ERR_NULL,
                 "recv_topk_weights");
    COMBINE_WITH(flags, 2u, EPX_ERR_INVALID, "2");
    COMBINE_WITH(num_workers, -4, EPX_ERR_INVALID, "-4");
    COMBINE_WITH(num_workers, 3, EPX_ERR_INVALID, "3");
    fixture_untouched(&f);
    WORKS(epx_combine(f.plan, &f.combine, NULL));
    assert_int_equal(f.out.x[0], 0);
    fixture_close(&f);
}

/* ---- send-only ---- */

static void
send_only_states(void **state)
{
    epx_plan_counts_t counts = EPX_PLAN_COUNTS_INIT;
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, HIDDEN * 2);
    f.dispatch.flags = EPX_SEND_ONLY;
    DISPATCH_WITH(hidden, HIDDEN + 8, EPX_ERR_SHAPE, "48");
    fixture_untouched(&f);
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    REFUSED(epx_dispatch(f.plan, &f.dispatch, NULL), EPX_ERR_STATE,
            "send-only");
    REFUSED(epx_combine(f.plan, &f.combine, NULL), EPX_ERR_STATE, "send-only");
    REFUSED(epx_plan_update(f.plan, 0, NULL, NULL), EPX_ERR_STATE, "send-only");
    REFUSED(epx_plan_destroy(f.plan), EPX_ERR_STATE, "send-only");
    WORKS(epx_plan_counts(f.plan, &counts));
    WORKS(epx_complete(f.plan, NULL));
    REFUSED(epx_complete(f.plan, NULL), EPX_ERR_STATE, "send-only");
    fixture_close(&f);
}

static void
at_most_eight_open(void **state)
{
    epx_group_t *group = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;
    static uint16_t x[API_TOKENS * HIDDEN];
    static uint16_t recv[9][ROWS * HIDDEN];
    epx_plan_t *plans[9];

    (void)state;
    args.send_only_row_bytes = HIDDEN * 2;
    dispatch.x = x;
    dispatch.hidden = HIDDEN;
    dispatch.dtype = EPX_BF16;
    dispatch.recv_rows = ROWS;
    dispatch.flags = EPX_SEND_ONLY;
    for (int i = 0; i < 9; i++) {
        WORKS(epx_plan_create(group, &args, NULL, &plans[i]));
    }
    for (int i = 0; i < 8; i++) {
        dispatch.recv_x = recv[i];
        WORKS(epx_dispatch(plans[i], &dispatch, NULL));
    }
    dispatch.recv_x = recv[8];
    REFUSED(epx_dispatch(plans[8], &dispatch, NULL), EPX_ERR_STATE, "8");
    for (int i = 7; i >= 0; i--) {
        WORKS(epx_complete(plans[i], NULL));
    }
    WORKS(epx_dispatch(plans[8], &dispatch, NULL));
    WORKS(epx_complete(plans[8], NULL));
    for (int i = 0; i < 9; i++) {
        WORKS(epx_plan_destroy(plans[i]));
    }
    WORKS(epx_group_destroy(group));
}

/* ---- resources, other groups ---- */

/* Staging for buffers outside EPX memory does not fit in the heap. */
static void
staging_exhausts_the_heap(void **state)
{
    enum { WIDE = 1 << 19 }; /* elements: four rows are 4 MiB */
    uint16_t *x = calloc(API_TOKENS, WIDE * sizeof(*x));
    uint16_t *recv = calloc(API_TOKENS, WIDE * sizeof(*recv));
    fixture_t f;

    (void)state;
    assert_non_null(x);
    assert_non_null(recv);
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    memset(recv, 0x3c, API_TOKENS * WIDE * sizeof(*recv));
    f.dispatch.x = x;
    f.dispatch.hidden = WIDE;
    f.dispatch.recv_x = recv;
    f.dispatch.recv_rows = API_TOKENS;
    REFUSED(epx_dispatch(f.plan, &f.dispatch, NULL), EPX_ERR_HEAP_EXHAUSTED,
            "heap");
    assert_int_equal(recv[0], 0x3c3c);
    f.dispatch.hidden = HIDDEN;
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    f.combine.x = recv;
    f.combine.hidden = WIDE;
    f.combine.num_rows = API_TOKENS;
    f.combine.out = x;
    REFUSED(epx_combine(f.plan, &f.combine, NULL), EPX_ERR_HEAP_EXHAUSTED,
            "heap");
    f.combine.hidden = HIDDEN;
    WORKS(epx_combine(f.plan, &f.combine, NULL));
    fixture_close(&f);
    free(x);
    free(recv);
}

static void
queue_of_another_group(void **state)
{
    epx_group_t *other = api_group_of_one(1 << 20);
    epx_plan_args_t args = api_plan_args(EPX_LAYOUT_RANK_MAJOR);
    epx_plan_t *plan;
    epx_queue_t *queue;
    fixture_t f;

    (void)state;
    fixture_open(&f, EPX_LAYOUT_RANK_MAJOR, 0);
    WORKS(epx_queue_create(other, &queue));
    REFUSED(epx_plan_create(f.group, &args, queue, &plan), EPX_ERR_WRONG_GROUP,
            "group");
    REFUSED(epx_plan_update(f.plan, 0, NULL, queue), EPX_ERR_WRONG_GROUP,
            "group");
    REFUSED(epx_dispatch(f.plan, &f.dispatch, queue), EPX_ERR_WRONG_GROUP,
            "group");
    REFUSED(epx_combine(f.plan, &f.combine, queue), EPX_ERR_WRONG_GROUP,
            "group");
    f.dispatch.flags = EPX_SEND_ONLY;
    WORKS(epx_dispatch(f.plan, &f.dispatch, NULL));
    REFUSED(epx_complete(f.plan, queue), EPX_ERR_WRONG_GROUP, "group");
    WORKS(epx_complete(f.plan, NULL));
    WORKS(epx_queue_destroy(queue));
    WORKS(epx_group_destroy(other));
    fixture_close(&f);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(functions_without_state),
        cmocka_unit_test(null_is_allowed_where_documented),
        cmocka_unit_test(bootstrap_of_threads),
        cmocka_unit_test(group_config),
        cmocka_unit_test(network_config),
        cmocka_unit_test(group_with_something_alive),
        cmocka_unit_test(memory),
        cmocka_unit_test(plan_arguments),
        cmocka_unit_test(expert_indices),
        cmocka_unit_test(plan_calls),
        cmocka_unit_test(dispatch_arguments),
        cmocka_unit_test(dispatch_scales),
        cmocka_unit_test(dispatch_quantize),
        cmocka_unit_test(dispatch_in_expert_layouts),
        cmocka_unit_test(dispatch_into_short_epx_memory),
        cmocka_unit_test(combine_arguments),
        cmocka_unit_test(send_only_states),
        cmocka_unit_test(at_most_eight_open),
        cmocka_unit_test(staging_exhausts_the_heap),
        cmocka_unit_test(queue_of_another_group),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
