/* SPDX-License-Identifier: MIT */
/* Uses an installed EPX, as C and as C++: one token to one expert and back. */
#include <epx/epx.h>
#include <stdio.h>
#include <string.h>

#define HIDDEN 4

static epx_status_t
round_trip(epx_group_t *group, const float *in, float *out)
{
    epx_plan_args_t routing = EPX_PLAN_ARGS_INIT;
    epx_dispatch_args_t dispatch = EPX_DISPATCH_ARGS_INIT;
    epx_combine_args_t combine = EPX_COMBINE_ARGS_INIT;
    epx_plan_t *plan = NULL;
    int64_t expert = 0;
    float received[HIDDEN];
    epx_status_t status;

    routing.layout = EPX_LAYOUT_RANK_MAJOR;
    routing.num_experts = 1;
    routing.topk = 1;
    routing.num_tokens = 1;
    routing.topk_idx = &expert;
    status = epx_plan_create(group, &routing, NULL, &plan);
    if (status != EPX_OK) {
        return status;
    }
    dispatch.x = in;
    dispatch.hidden = HIDDEN;
    dispatch.dtype = EPX_F32;
    dispatch.recv_x = received;
    dispatch.recv_rows = 1;
    combine.x = received;
    combine.num_rows = 1;
    combine.hidden = HIDDEN;
    combine.dtype = EPX_F32;
    combine.out = out;
    status = epx_dispatch(plan, &dispatch, NULL);
    if (status == EPX_OK) {
        status = epx_combine(plan, &combine, NULL);
    }
    (void)epx_plan_destroy(plan);
    return status;
}

int
main(void)
{
    static const float in[HIDDEN] = { 1.0f, 2.0f, -3.0f, 0.5f };
    float out[HIDDEN] = { 0.0f, 0.0f, 0.0f, 0.0f };
    epx_library_info_t info = EPX_LIBRARY_INFO_INIT;
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_bootstrap_t *bootstrap = NULL;
    epx_group_t *group = NULL;

    config.heap_bytes = 1 << 20;
    if (epx_library_query(&info) != EPX_OK ||
        epx_bootstrap_threads_create(1, &bootstrap) != EPX_OK) {
        (void)fprintf(stderr, "%s\n", epx_last_error());
        return 1;
    }
    config.bootstrap = bootstrap;
    if (epx_group_create(&config, &group) != EPX_OK ||
        round_trip(group, in, out) != EPX_OK ||
        epx_group_destroy(group) != EPX_OK) {
        (void)fprintf(stderr, "%s\n", epx_last_error());
        return 1;
    }
    epx_bootstrap_destroy(bootstrap);
    (void)printf("version %s, round trip %s\n", info.version,
                 memcmp(in, out, sizeof(in)) == 0 ? "right" : "wrong");
    return 0;
}
