/* SPDX-License-Identifier: MIT */
/*
 * A rank whose heads of parcels say what cannot be, as seen by a rank of
 * another node: it is refused before a kernel follows it.  Two ranks, a node
 * each, over a simulated network that rewrites what one of them sends.
 */
#include "conformance/world.h"
#include "engine/cuda/cuda_rail.h"
#include "net/sim.h"

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One expert a token, so that some more tokens have heads of the same length.
 */
enum { RANKS = 2, TOKENS = 10, HIDDEN = 64, LIAR = 0, HEAD_CHANNELS = 32 };

typedef struct lie {
    const char *name;
    size_t at; /* in the head */
    size_t bytes;
    uint64_t value;
    int nth;              /* of the heads that it sends, from 1; 0: none */
    const char *dispatch; /* what the other rank is told of each, "" if */
    const char *combine;  /* nothing */
} lie_t;

#define HEAD(field)                      \
    offsetof(cuda_parcel_head_t, field), \
        sizeof(((cuda_parcel_head_t *)0)->field)
#define UNACCOUNTED "which its head does not account for"

/* Of the liar's heads the first is its dispatch's, then come its combine's:
 * tokens, and sums for the other rank. */
static const lie_t lies[] = {
    { "nothing", 0, 0, 0, 0, "", "" },
    { "more tokens than there can be", HEAD(count), 16, 1, UNACCOUNTED, "" },
    { "more rows than it sends", HEAD(count), 9, 1, "and told of", "" },
    { "another step", HEAD(step), 77, 1, UNACCOUNTED, "" },
    { "weights", HEAD(has_weights), 1, 1, UNACCOUNTED, "" },
    { "2^64 - 1 tokens", HEAD(count), UINT64_MAX, 1, UNACCOUNTED, "" },
    { "more tokens, in a combine", HEAD(count), 16, 2, "", UNACCOUNTED },
    { "more sums than were asked for", HEAD(count), 16, 3, "", UNACCOUNTED },
    { "fewer sums than were asked for", HEAD(count), 9, 3, "", UNACCOUNTED },
};

typedef struct scene {
    const lie_t *lie;
    uint32_t num_heads;
} scene_t;

static void
tamper(void *context, int32_t from, const epx__net_header_t *header,
       unsigned char *payload)
{
    scene_t *scene = context;

    if (from != LIAR || header->kind != EPX__NET_KIND_PIECE ||
        header->channel >= HEAD_CHANNELS || header->offset != 0) {
        return;
    }
    scene->num_heads++;
    if ((int)scene->num_heads == scene->lie->nth) {
        memcpy(payload + scene->lie->at, &scene->lie->value, scene->lie->bytes);
    }
}

static void *
on_card(size_t bytes)
{
    void *memory = NULL;

    if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        abort();
    }
    memset(memory, 0, bytes);
    return memory;
}

typedef struct member {
    world_rank_t *self;
    epx_group_t *group;
    epx_plan_t *plan;
    cudaStream_t stream;
    int64_t *idx;
    void *x, *recv, *out;
} member_t;

/* What the call came to: its own error, or what the group then tells. */
static void
expect(member_t *m, const char *what, epx_status_t status, const char *word)
{
    epx_status_t want = *word == '\0' ? EPX_OK : EPX_ERR_PEER_DATA;

    if (status == EPX_OK) {
        (void)cudaStreamSynchronize(m->stream);
        status = epx_group_status(m->group);
    }
    /* Whoever sent it is told by the other, if it has not left by then. */
    if (m->self->rank != LIAR || status != EPX_OK) {
        world_expect(m->self, what, status, want, word);
    }
}

static epx_status_t
dispatch(member_t *m)
{
    epx_dispatch_args_t args = EPX_DISPATCH_ARGS_INIT;

    args.x = m->x;
    args.hidden = HIDDEN;
    args.dtype = EPX_BF16;
    args.recv_x = m->recv;
    args.recv_rows = (int64_t)RANKS * TOKENS;
    return epx_dispatch(m->plan, &args, m->stream);
}

static epx_status_t
combine(member_t *m)
{
    epx_combine_args_t args = EPX_COMBINE_ARGS_INIT;

    args.x = m->recv;
    args.num_rows = (int64_t)RANKS * TOKENS;
    args.hidden = HIDDEN;
    args.dtype = EPX_BF16;
    args.out = m->out;
    return epx_combine(m->plan, &args, m->stream);
}

static void
work(member_t *m, const lie_t *lie)
{
    epx_plan_args_t args = EPX_PLAN_ARGS_INIT;

    args.layout = EPX_LAYOUT_RANK_MAJOR;
    args.num_experts = RANKS;
    args.topk = 1;
    args.idx_dtype = EPX_I64;
    args.num_tokens = TOKENS;
    args.topk_idx = m->idx;
    args.max_tokens_per_rank = TOKENS;
    args.recv_capacity = (int64_t)RANKS * TOKENS;
    if (world_failed(m->self,
                     epx_plan_create(m->group, &args, m->stream, &m->plan),
                     "a plan")) {
        return;
    }
    expect(m, "a dispatch", dispatch(m), lie->dispatch);
    if (*lie->dispatch == '\0') {
        expect(m, "a combine", combine(m), lie->combine);
    }
    (void)world_failed(m->self, epx_plan_destroy(m->plan), "its end");
}

static void
run_rank(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    const scene_t *scene = context;
    member_t m = { .self = self };
    size_t row = HIDDEN * sizeof(uint16_t);

    network.device = "lo";
    config.bootstrap = self->bootstrap;
    config.network = &network;
    config.node = 1 + self->rank;
    config.device = EPX_DEVICE_CUDA;
    config.heap_bytes = 8 << 20;
    config.num_workers = 2;
    (void)cudaStreamCreateWithFlags(&m.stream, cudaStreamNonBlocking);
    m.idx = on_card(TOKENS * sizeof(*m.idx));
    for (int i = 0; i < TOKENS; i++) {
        m.idx[i] = 1 - self->rank; /* to the other rank */
    }
    m.x = on_card(TOKENS * row);
    m.recv = on_card((size_t)RANKS * TOKENS * row);
    m.out = on_card(TOKENS * row);
    if (!world_failed(self, epx_group_create(&config, &m.group), "a group")) {
        work(&m, scene->lie);
        (void)world_failed(self, epx_group_destroy(m.group), "the end");
    }
    (void)cudaStreamDestroy(m.stream);
    (void)cudaFree(m.idx);
    (void)cudaFree(m.x);
    (void)cudaFree(m.recv);
    (void)cudaFree(m.out);
}

static bool
run(const lie_t *lie)
{
    const sim_faults_t faults = { 0 };
    char text[RANKS * WORLD_TEXT];
    scene_t scene = { .lie = lie };
    sim_t *sim = sim_create(RANKS, 1, &faults);
    bool is_well;

    sim_use(sim);
    sim_tamper(sim, tamper, &scene);
    is_well = world_run(WORLD_THREAD, RANKS, true, 1, run_rank, &scene, NULL,
                        text, sizeof(text));
    sim_use(NULL);
    sim_destroy(sim);
    if (!is_well || (int)scene.num_heads < lie->nth) {
        fprintf(stderr, "%s, in head %d of %d:\n%s", lie->name, lie->nth,
                (int)scene.num_heads, text);
    }
    return is_well && (int)scene.num_heads >= lie->nth;
}

int
main(void)
{
    bool is_well = true;

    for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
        is_well = run(&lies[i]) && is_well;
    }
    return is_well ? 0 : 1;
}
