/* SPDX-License-Identifier: MIT */
/* What dispatch and combine have in common between nodes: parcels. */
#include "engine/cpu/cpu_rail.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A region has as many chunks as are so long: what hides behind the network has
 * to be worth the waits for them. */
#define CHUNK_BYTES (UINT64_C(1) << 18)

/* Less is packed by one worker sooner than by several, who have to be told. */
#define PACK_BYTES (UINT64_C(1) << 15)

/* ---- the arrays of a parcel ---- */

static cpu_parcel_t
lay_out(const cpu_parcel_kind_t *kind, int64_t begin, int64_t end)
{
    uint64_t count = (uint64_t)(end - begin);
    uint64_t topk = (uint64_t)kind->topk;
    cpu_parcel_t parcel = { .begin = begin, .count = end - begin };

    parcel.weights = epx__round_up(
        kind->has_heads ? count * (1 + 2 * topk) * sizeof(int32_t) : 0,
        EPX__LINE);
    parcel.scales =
        parcel.weights +
        epx__round_up(kind->has_weights ? count * topk * sizeof(float) : 0,
                      EPX__LINE);
    parcel.rows = parcel.scales + epx__round_up(count * sizeof(uint32_t) *
                                                    (uint64_t)kind->num_scales,
                                                EPX__LINE);
    parcel.bytes = parcel.rows + count * (uint64_t)kind->row_bytes;
    return parcel;
}

int
cpu_parcels(const cpu_parcel_kind_t *kind, int64_t num_tokens)
{
    uint64_t bytes = lay_out(kind, 0, num_tokens).bytes;

    if (bytes < CHUNK_BYTES) {
        return bytes > 0;
    }
    return bytes / CHUNK_BYTES < CPU_CHUNKS ? (int)(bytes / CHUNK_BYTES)
                                            : CPU_CHUNKS;
}

cpu_parcel_t
cpu_parcel(const cpu_parcel_kind_t *kind, int64_t num_tokens, int chunk)
{
    int count = cpu_parcels(kind, num_tokens);

    if (chunk >= count) {
        return (cpu_parcel_t){ .begin = num_tokens };
    }
    return lay_out(kind, num_tokens * chunk / count,
                   num_tokens * (chunk + 1) / count);
}

uint64_t
cpu_parcel_room(const cpu_parcel_kind_t *kind, int64_t num_tokens)
{
    uint64_t room = 0;

    for (int c = 0; c < cpu_parcels(kind, num_tokens); c++) {
        uint64_t bytes = cpu_parcel(kind, num_tokens, c).bytes;

        room = bytes > room ? bytes : room;
    }
    return room;
}

cpu_parcel_kind_t
cpu_rail_kind(const cpu_plan_t *plan, int32_t rank)
{
    const epx_group_t *group = plan->base.group;
    cpu_parcel_kind_t kind = {
        .topk = (int32_t)plan->base.key.topk,
        .has_heads = !plan->rails_know,
    };

    if (plan->pending == EPX__PENDING_COMBINE) {
        kind.has_weights =
            rank == group->rank
                ? plan->combine.args.topk_weights != NULL
                : cpu_engine(group)->posts[rank].lane_weights != 0;
    } else {
        kind.has_weights = plan->dispatch.shape.has_weights;
        kind.num_scales = plan->dispatch.shape.num_scales;
        kind.row_bytes = plan->dispatch.shape.row_bytes;
    }
    return kind;
}

/* ---- sending ---- */

typedef struct packer {
    const cpu_plan_t *plan;
    cpu_parcel_kind_t kind;
    cpu_parcel_t parcel;
    int32_t node;
    const int32_t *tokens; /* those of the parcel */
    const float *topk_weights;
    bool packs_rows;
    char *to; /* the parcel, without its rows if they are sent from x */
    cpu_share_t share;
} packer_t;

static int32_t
ordinal_of(const cpu_plan_t *plan, int64_t entry, const cpu_route_t *routes)
{
    int32_t rank = plan->expert_rank[plan->experts[entry]];
    int32_t i = 0;

    if (!cpu_is_rank_major(plan)) {
        return plan->ordinals[entry];
    }
    while (routes[i].rank != rank) {
        i++;
    }
    return routes[i].ordinal;
}

static void
pack_head(const packer_t *packer, int64_t i)
{
    const cpu_plan_t *plan = packer->plan;
    const epx__nodes_t *nodes = &plan->base.group->nodes;
    int32_t topk = packer->kind.topk;
    int64_t entry = (int64_t)packer->tokens[i] * topk;
    int32_t *head = (int32_t *)(void *)packer->to + i * cpu_head_length(plan);

    head[0] = packer->tokens[i];
    for (int32_t k = 0; k < topk; k++) {
        int32_t expert = plan->experts[entry + k];
        bool there = expert >= 0 &&
                     nodes->node_of[plan->expert_rank[expert]] == packer->node;

        head[1 + k] = there ? expert : -1;
        head[1 + topk + k] =
            there ? ordinal_of(plan, entry + k, plan->routes + entry) : 0;
    }
}

static void
pack_token(const packer_t *packer, int64_t i, void *scratch)
{
    const cpu_plan_t *plan = packer->plan;
    const cpu_parcel_kind_t *kind = &packer->kind;
    int64_t t = packer->tokens[i];
    cpu_source_row_t source;

    if (kind->has_heads) {
        pack_head(packer, i);
    }
    if (kind->has_weights) {
        size_t bytes = (size_t)kind->topk * sizeof(float);

        memcpy(packer->to + packer->parcel.weights + (size_t)i * bytes,
               packer->topk_weights + t * kind->topk, bytes);
    }
    if (kind->num_scales == 0 && !packer->packs_rows) {
        return;
    }
    source = cpu_source_row(plan, scratch, t);
    if (kind->num_scales > 0) {
        size_t bytes = (size_t)kind->num_scales * sizeof(uint32_t);

        memcpy(packer->to + packer->parcel.scales + (size_t)i * bytes,
               source.scales, bytes);
    }
    if (packer->packs_rows) {
        memcpy(packer->to + packer->parcel.rows + i * kind->row_bytes,
               source.payload, (size_t)kind->row_bytes);
    }
}

static void
pack_work(void *context, int32_t worker)
{
    packer_t *packer = context;
    void *scratch = cpu_scratch(cpu_engine(packer->plan->base.group), worker);
    int64_t begin, end;

    while (cpu_share_next(&packer->share, worker, &begin, &end)) {
        for (int64_t i = begin; i < end; i++) {
            pack_token(packer, i, scratch);
        }
    }
}

/* The parcel as it is sent: what was packed, then rows from where they are. */
static uint32_t
list_ranges(const packer_t *packer, struct iovec *ranges)
{
    const epx_dispatch_args_t *args = &packer->plan->dispatch.args;
    size_t bytes = (size_t)packer->kind.row_bytes;
    size_t packed = packer->packs_rows || bytes == 0 ? packer->parcel.bytes
                                                     : packer->parcel.rows;
    uint32_t count = 0;

    if (packed > 0) {
        ranges[count++] = (struct iovec){ packer->to, packed };
    }
    for (int64_t i = 0;
         bytes > 0 && !packer->packs_rows && i < packer->parcel.count; i++) {
        /* Nobody writes to what is sent. */
        char *row =
            (char *)(uintptr_t)args->x + (size_t)packer->tokens[i] * bytes;

        count = cpu_range_add(ranges, count, (struct iovec){ row, bytes });
    }
    return count;
}

static bool
packs_rows(const cpu_plan_t *plan)
{
    return plan->pending == EPX__PENDING_DISPATCH &&
           plan->dispatch.args.quantize != EPX_QUANTIZE_NONE;
}

static uint64_t
out_bytes(const cpu_parcel_kind_t *kind, int64_t num_tokens, bool packs)
{
    uint64_t bytes = 0;

    for (int c = 0; c < cpu_parcels(kind, num_tokens); c++) {
        cpu_parcel_t parcel = cpu_parcel(kind, num_tokens, c);

        bytes +=
            epx__round_up(packs ? parcel.bytes : parcel.rows, EPX__LINE) +
            epx__round_up(((uint64_t)parcel.count + 1) * sizeof(struct iovec),
                          EPX__LINE);
    }
    return bytes;
}

static bool
goes_ahead(const cpu_plan_t *plan)
{
    return plan->pending == EPX__PENDING_COMBINE && plan->combine.goes_ahead;
}

/* How a chunk goes to a rail. */
static cpu_turn_t
turn_there(const cpu_plan_t *plan, int32_t rail, int chunk)
{
    const epx__post_t *post = &cpu_engine(plan->base.group)->posts[rail];

    return goes_ahead(plan) ? cpu_slots_turn_there(plan, rail)
                            : cpu_post_turn(post, EPX__LANE_OUT, chunk);
}

/* How one comes here. */
static cpu_turn_t
turn_here(const cpu_plan_t *plan, const cpu_lane_t *lane, int chunk)
{
    return goes_ahead(plan) ? cpu_slots_turn_here(plan)
                            : cpu_lane_turn(lane, chunk);
}

const char *
cpu_rail_chunk(const cpu_plan_t *plan, const cpu_lane_t *lane, int32_t f,
               int chunk)
{
    return goes_ahead(plan) ? cpu_slots_parcel(plan, plan->forwards[f].rank)
                            : cpu_lane_chunk(lane, f, chunk);
}

static epx_status_t
send_parcel(cpu_plan_t *plan, cpu_lane_t *lane, const cpu_parcel_kind_t *kind,
            int32_t node, int chunk)
{
    epx_group_t *group = plan->base.group;
    cpu_engine_t *engine = cpu_engine(group);
    int32_t rail = engine->rails->sources[EPX__LANE_BACK][node];
    bool is_dispatch = plan->pending == EPX__PENDING_DISPATCH;
    int32_t num_workers =
        cpu_workers(group, is_dispatch ? plan->dispatch.args.num_workers
                                       : plan->combine.args.num_workers);
    packer_t packer = {
        .plan = plan,
        .kind = *kind,
        .parcel = cpu_parcel(kind, plan->sent_nodes[node], chunk),
        .node = node,
        .topk_weights = is_dispatch ? plan->dispatch.args.topk_weights
                                    : plan->combine.args.topk_weights,
        .packs_rows = packs_rows(plan),
    };
    struct iovec *ranges;
    uint64_t packed =
        packer.packs_rows ? packer.parcel.bytes : packer.parcel.rows;
    int32_t packers = packed < PACK_BYTES ? 1 : num_workers;

    lane->lends = lane->lends || (kind->row_bytes > 0 && !packer.packs_rows);
    packer.tokens =
        plan->node_tokens + node * plan->token_capacity + packer.parcel.begin;
    packer.to = cpu_lane_out(lane, packed);
    ranges = cpu_lane_out(lane, ((uint64_t)packer.parcel.count + 1) *
                                    sizeof(*ranges));
    packer.share = cpu_share_of(group, packer.parcel.count, packers);
    epx__pool_run(engine->pool, packers, pack_work, &packer);
    return cpu_lane_send(group, lane, rail, turn_there(plan, rail, chunk),
                         ranges, list_ranges(&packer, ranges),
                         num_workers > 1 || goes_ahead(plan));
}

epx_status_t
cpu_rail_check(cpu_plan_t *plan)
{
    epx_group_t *group = plan->base.group;
    const cpu_engine_t *engine = cpu_engine(group);
    epx_status_t status = EPX_OK;

    for (int32_t n = 0; n < group->nodes.num_nodes && status == EPX_OK; n++) {
        int32_t rail = engine->rails->sources[EPX__LANE_BACK][n];

        if (rail >= 0) {
            status = cpu_lane_check(rail, EPX__LANE_OUT, &engine->posts[rail]);
        }
    }
    for (int32_t f = 0; f < plan->num_forwards && status == EPX_OK &&
                        plan->pending == EPX__PENDING_COMBINE;
         f++) {
        int32_t rank = plan->forwards[f].rank;

        status = cpu_lane_check(rank, EPX__LANE_BACK, &engine->posts[rank]);
    }
    return status == EPX_OK ? EPX_OK : epx__group_break(group, status);
}

epx_status_t
cpu_rail_send(cpu_plan_t *plan, cpu_lane_t *lane)
{
    epx_group_t *group = plan->base.group;
    cpu_parcel_kind_t kind = cpu_rail_kind(plan, group->rank);
    uint64_t bytes = 0;
    epx_status_t status;

    for (int32_t n = 0; n < group->nodes.num_nodes; n++) {
        if (n != group->nodes.own) {
            bytes += out_bytes(&kind, plan->sent_nodes[n], packs_rows(plan));
        }
    }
    status = cpu_lane_reserve(lane, bytes);
    if (status != EPX_OK) { /* the peers wait for it */
        return epx__group_break(group, status);
    }
    for (int c = 0; c < CPU_CHUNKS; c++) {
        for (int32_t n = 0; n < group->nodes.num_nodes && status == EPX_OK;
             n++) {
            if (n != group->nodes.own &&
                c < cpu_parcels(&kind, plan->sent_nodes[n])) {
                status = send_parcel(plan, lane, &kind, n, c);
            }
        }
    }
    return status;
}

/* ---- receiving ---- */

/* Whether a head is one that the source's counts allow: its rows lie where the
 * source's rows do. */
static bool
head_is_possible(const cpu_plan_t *plan, const cpu_forward_t *forward,
                 const int32_t *head)
{
    const epx_group_t *group = plan->base.group;
    int32_t topk = (int32_t)plan->base.key.topk;
    const uint32_t *rows = forward->counts + group->num_ranks;

    if (head[0] < 0 || head[0] >= forward->source_tokens) {
        return false;
    }
    for (int32_t k = 0; k < topk; k++) {
        int32_t expert = head[1 + k];
        int32_t ordinal = head[1 + topk + k];
        int32_t rank;

        if (expert == -1) {
            continue;
        }
        if (expert < 0 || expert >= (int32_t)plan->base.key.num_experts) {
            return false;
        }
        rank = plan->expert_rank[expert];
        if (!epx__is_near(&group->nodes, rank) || ordinal < 0 ||
            (uint32_t)ordinal >= (cpu_is_rank_major(plan)
                                      ? forward->counts[rank]
                                      : rows[expert])) {
            return false;
        }
    }
    return true;
}

static epx_status_t
reserve_heads(const cpu_plan_t *plan, cpu_forward_t *forward)
{
    size_t bytes = (size_t)forward->num_tokens * (size_t)cpu_head_length(plan) *
                   sizeof(int32_t);

    if (forward->num_tokens <= forward->head_capacity) {
        return EPX_OK;
    }
    free(forward->heads);
    forward->heads = malloc(bytes);
    forward->head_capacity = forward->heads == NULL ? 0 : forward->num_tokens;
    return forward->heads != NULL
               ? EPX_OK
               : epx__fail(EPX_ERR_NO_MEMORY,
                           "no memory for the routing of %" PRId64
                           " tokens of another node",
                           forward->num_tokens);
}

static epx_status_t
take_heads(cpu_plan_t *plan, cpu_forward_t *forward, const cpu_parcel_t *parcel,
           const char *chunk)
{
    int64_t length = cpu_head_length(plan);
    int32_t *heads;
    epx_status_t status = reserve_heads(plan, forward);

    if (status != EPX_OK) {
        return status;
    }
    heads = forward->heads + parcel->begin * length;
    memcpy(heads, chunk, (size_t)(parcel->count * length) * sizeof(*heads));
    for (int64_t i = 0; i < parcel->count; i++) {
        if (!head_is_possible(plan, forward, heads + i * length)) {
            return epx__fail(EPX_ERR_PEER_DATA,
                             "the routing of a token that rank %d sent does "
                             "not fit its counts",
                             forward->rank);
        }
    }
    return EPX_OK;
}

cpu_token_t
cpu_forward_token(const cpu_plan_t *plan, const cpu_forward_t *forward,
                  int64_t i, const float *weights, cpu_route_t *routes)
{
    int32_t topk = (int32_t)plan->base.key.topk;
    const int32_t *head = forward->heads + i * cpu_head_length(plan);
    int32_t count = 0;

    for (int32_t k = 0; cpu_is_rank_major(plan) && k < topk; k++) {
        int32_t rank = head[1 + k] < 0 ? -1 : plan->expert_rank[head[1 + k]];
        int32_t at = 0;

        while (at < count && routes[at].rank < rank) {
            at++;
        }
        if (rank < 0 || (at < count && routes[at].rank == rank)) {
            continue;
        }
        memmove(routes + at + 1, routes + at,
                (size_t)(count - at) * sizeof(*routes));
        routes[at] = (cpu_route_t){ rank, head[1 + topk + k] };
        count++;
    }
    if (count < topk) {
        routes[count].rank = -1;
    }
    return (cpu_token_t){
        .index = head[0],
        .experts = head + 1,
        .ordinals = head + 1 + topk,
        .routes = routes,
        .weights = weights,
        .rank_base = forward->rank_base,
        .expert_base = forward->expert_base,
    };
}

/* A chunk of all sources that send one. */
static epx_status_t
receive_chunk(cpu_plan_t *plan, const cpu_lane_t *lane, int chunk,
              const char *what, cpu_rail_fn_t *fn)
{
    epx_group_t *group = plan->base.group;
    bool *wanted = cpu_engine(group)->rails->wanted;
    cpu_turn_t turn = turn_here(plan, lane, chunk);
    epx_status_t status;

    memset(wanted, 0, (size_t)group->num_ranks * sizeof(*wanted));
    for (int32_t f = 0; f < plan->num_forwards; f++) {
        const cpu_forward_t *forward = &plan->forwards[f];
        cpu_parcel_kind_t kind = cpu_rail_kind(plan, forward->rank);

        wanted[forward->rank] = chunk < cpu_parcels(&kind, forward->num_tokens);
    }
    status = cpu_turn_wait(group, turn, what);
    for (int32_t f = 0; f < plan->num_forwards && status == EPX_OK; f++) {
        cpu_forward_t *forward = &plan->forwards[f];
        cpu_parcel_kind_t kind = cpu_rail_kind(plan, forward->rank);
        const char *at = cpu_rail_chunk(plan, lane, f, chunk);
        cpu_parcel_t parcel;

        if (!wanted[forward->rank]) {
            continue;
        }
        parcel = cpu_parcel(&kind, forward->num_tokens, chunk);
        status = cpu_turn_check(group, turn, forward->rank, parcel.bytes);
        if (status == EPX_OK && kind.has_heads) {
            status = take_heads(plan, forward, &parcel, at);
        }
        if (status == EPX_OK && fn != NULL) {
            fn(plan, forward, &parcel, at);
        }
    }
    return status == EPX_OK ? EPX_OK : epx__group_break(group, status);
}

epx_status_t
cpu_rail_receive(cpu_plan_t *plan, const cpu_lane_t *lane, const char *what,
                 cpu_rail_fn_t *fn)
{
    epx_status_t status = EPX_OK;

    for (int c = 0; c < CPU_CHUNKS && status == EPX_OK; c++) {
        status = receive_chunk(plan, lane, c, what, fn);
    }
    return status;
}

epx_status_t
cpu_rail_wait_sent(epx_group_t *group, cpu_lane_t *const lanes[EPX__NUM_LANES])
{
    epx_status_t status = EPX_OK;

    for (int kind = 0; kind < EPX__NUM_LANES && status == EPX_OK; kind++) {
        if (lanes[kind] != NULL) {
            status = cpu_lane_wait_sent(group, lanes[kind],
                                        "sending tokens to other nodes");
        }
    }
    return status;
}

void
cpu_rail_give(epx_group_t *group, cpu_lane_t *lanes[EPX__NUM_LANES])
{
    for (int kind = 0; kind < EPX__NUM_LANES; kind++) {
        cpu_lane_give(group, lanes[kind]);
        lanes[kind] = NULL;
    }
}
