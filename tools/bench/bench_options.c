/* SPDX-License-Identifier: MIT */
#include "bench_options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

/* A process has so many queues to a card.  Streams that share one wait for each
 * other, which those of ranks must not. */
#define MAX_THREADS_ON_CARD 32

#define MAX_TOKENS (1 << 24)

struct word {
    const char *name;
    int value;
};

static const struct word mode_words[] = { { "ht", BENCH_HT },
                                          { "ll", BENCH_LL },
                                          { 0 } };
static const struct word layout_words[] = {
    { "rank", EPX_LAYOUT_RANK_MAJOR },
    { "expert", EPX_LAYOUT_EXPERT_MAJOR },
    { "slots", EPX_LAYOUT_EXPERT_SLOTS },
    { 0 }
};
static const struct word dtype_words[] = { { "bf16", EPX_BF16 },
                                           { "fp8", EPX_F8E4M3 },
                                           { "f32", EPX_F32 },
                                           { "f16", EPX_F16 },
                                           { 0 } };
static const struct word quantize_words[] = {
    { "f32", EPX_QUANTIZE_F8E4M3_F32 },
    { "pow2", EPX_QUANTIZE_F8E4M3_POW2 },
    { "ue8m0", EPX_QUANTIZE_F8E4M3_UE8M0 },
    { 0 }
};
static const struct word buffers_words[] = { { "epx", 0 },
                                             { "outside", 1 },
                                             { 0 } };

static const char *
word_name(const struct word *words, int value)
{
    for (; words->name; words++) {
        if (words->value == value) {
            return words->name;
        }
    }
    return NULL;
}

const char *
bench_mode_name(enum bench_mode mode)
{
    return word_name(mode_words, (int)mode);
}

const char *
bench_layout_name(epx_layout_t layout)
{
    return word_name(layout_words, (int)layout);
}

const char *
bench_dtype_name(epx_dtype_t dtype)
{
    return word_name(dtype_words, (int)dtype);
}

const char *
bench_quantize_name(epx_quantize_t quantize)
{
    return word_name(quantize_words, (int)quantize);
}

static bool
parse_word(const char *option, const char *text, const struct word *words,
           int *value_p, struct bench_error *error)
{
    char allowed[128] = "";
    size_t length = 0;
    for (const struct word *w = words; w->name; w++) {
        if (!strcmp(text, w->name)) {
            *value_p = w->value;
            return true;
        }
        length += (size_t)snprintf(allowed + length, sizeof allowed - length,
                                   "%s%s", w == words ? "" : ", ", w->name);
    }
    return bench_fail(error, "--%s is '%s'; allowed: %s", option, text,
                      allowed);
}

bool
bench_options_fixed(const struct bench_options *options)
{
    return options->mode == BENCH_LL || options->graph;
}

/* Digits only, up to `end` or the end of the text. */
static bool
parse_digits(const char *text, size_t bytes, uint64_t *value_p)
{
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; i++) {
        unsigned digit = (unsigned)(text[i] - '0');
        if (digit > 9 || __builtin_mul_overflow(value, 10u, &value) ||
            __builtin_add_overflow(value, digit, &value)) {
            return false;
        }
    }
    *value_p = value;
    return bytes > 0;
}

static bool
parse_number(const char *option, const char *text, uint64_t min, uint64_t max,
             uint64_t *value_p, struct bench_error *error)
{
    if (parse_digits(text, strlen(text), value_p) && *value_p >= min &&
        *value_p <= max) {
        return true;
    }
    return bench_fail(error, "--%s is '%s'; allowed: %llu to %llu", option,
                      text, (unsigned long long)min, (unsigned long long)max);
}

static bool
parse_device(const char *text, struct bench_options *o,
             struct bench_error *error)
{
    uint64_t card = 0;
    o->device = strcmp(text, "cpu") ? EPX_DEVICE_CUDA : EPX_DEVICE_CPU;
    o->card = strcmp(text, "cuda:all") ? 0 : BENCH_ALL_CARDS;
    if (o->device == EPX_DEVICE_CPU || o->card == BENCH_ALL_CARDS ||
        !strcmp(text, "cuda")) {
        return true;
    }
    if (!strncmp(text, "cuda:", 5) &&
        parse_digits(text + 5, strlen(text + 5), &card) && card < INT32_MAX) {
        o->card = (int32_t)card;
        return true;
    }
    return bench_fail(error,
                      "--device is '%s'; allowed: cpu, cuda, cuda:N for card N "
                      "or cuda:all",
                      text);
}

static bool
parse_zipf(const char *text, struct bench_options *o, struct bench_error *error)
{
    static const char digits[] = "0123456789.";
    const char *exponent = text + strlen("zipf:");
    char *end = NULL;
    errno = 0;
    o->zipf_exponent = strtod(exponent, &end);
    if (errno || !*exponent || *end || exponent[strspn(exponent, digits)] ||
        o->zipf_exponent > 10) {
        return bench_fail(error,
                          "--routing is '%s'; zipf takes an exponent from 0 "
                          "to 10, as in zipf:1.2",
                          text);
    }
    o->routing = BENCH_ZIPF;
    return true;
}

static bool
parse_group(const char *text, struct bench_options *o,
            struct bench_error *error)
{
    const char *numbers = text + strlen("group:");
    const char *comma = strchr(numbers, ',');
    uint64_t groups = 0;
    uint64_t chosen = 0;
    if (!comma || !parse_digits(numbers, (size_t)(comma - numbers), &groups) ||
        !parse_digits(comma + 1, strlen(comma + 1), &chosen) || groups < 1 ||
        groups > INT32_MAX || chosen < 1 || chosen > groups) {
        return bench_fail(error,
                          "--routing is '%s'; group takes G groups and the M "
                          "of them, 1 to G, that a token may use, as in "
                          "group:8,4",
                          text);
    }
    o->routing = BENCH_GROUP;
    o->groups = (int32_t)groups;
    o->groups_per_token = (int32_t)chosen;
    return true;
}

static bool
parse_routing(const char *text, struct bench_options *o,
              struct bench_error *error)
{
    size_t length = strlen(text);
    o->routing_text = text;
    if (!strcmp(text, "uniform")) {
        o->routing = BENCH_UNIFORM;
        return true;
    }
    if (!strncmp(text, "zipf:", 5)) {
        return parse_zipf(text, o, error);
    }
    if (!strncmp(text, "group:", 6)) {
        return parse_group(text, o, error);
    }
    if (length > 4 && !strcmp(text + length - 4, ".csv")) {
        o->routing = BENCH_CSV;
        return true;
    }
    return bench_fail(error,
                      "--routing is '%s'; allowed: uniform, zipf:S, group:G,M "
                      "or a file whose name ends in .csv",
                      text);
}

static bool
parse_peers(const char *text, struct bench_options *o,
            struct bench_error *error)
{
    const char *at = text;
    for (;;) {
        size_t length = strcspn(at, ",");
        if (length == 6 && !memcmp(at, "memcpy", 6)) {
            o->vs_memcpy = true;
        } else if (length == 3 && !memcmp(at, "mpi", 3)) {
            o->vs_mpi = true;
        } else if (length == 3 && !memcmp(at, "ucx", 3)) {
            o->vs_ucx = true;
        } else if (length == 4 && !memcmp(at, "nccl", 4)) {
            o->vs_nccl = true;
        } else {
            return bench_fail(error,
                              "--vs is '%s'; allowed: memcpy, mpi, ucx and "
                              "nccl, with commas between them",
                              text);
        }
        if (!at[length]) {
            return true;
        }
        at += length + 1;
    }
}

/* One number, or several with commas between them. */
static bool
parse_tokens(const char *text, struct bench_options *o,
             struct bench_error *error)
{
    const char *at = text;
    o->num_token_counts = 0;
    for (;;) {
        size_t length = strcspn(at, ",");
        uint64_t value = 0;
        if (!parse_digits(at, length, &value) || value < 1 ||
            value > MAX_TOKENS || o->num_token_counts == BENCH_MAX_COUNTS) {
            return bench_fail(error,
                              "--tokens is '%s'; allowed: 1 to %d, or up to "
                              "%d such numbers with commas between them",
                              text, MAX_TOKENS, BENCH_MAX_COUNTS);
        }
        o->token_counts[o->num_token_counts++] = (int64_t)value;
        if (!at[length]) {
            o->tokens = o->token_counts[0];
            return true;
        }
        at += length + 1;
    }
}

enum option_id {
    OPT_DEVICE = 1,
    OPT_RANKS,
    OPT_HOSTS,
    OPT_NETNS,
    OPT_THREADS,
    OPT_PROCS,
    OPT_MODE,
    OPT_LAYOUT,
    OPT_TOKENS,
    OPT_HIDDEN,
    OPT_TOPK,
    OPT_EXPERTS,
    OPT_DTYPE,
    OPT_QUANTIZE,
    OPT_LOGFMT,
    OPT_ROUTING,
    OPT_WORKERS,
    OPT_ITERS,
    OPT_WARMUP,
    OPT_IN_A_ROW,
    OPT_OVERLAP,
    OPT_SEED,
    OPT_SOAK,
    OPT_CHECK,
    OPT_VS,
    OPT_JSON,
    OPT_SEND_ONLY,
    OPT_NO_BIND,
    OPT_BUFFERS,
    OPT_GRAPH,
    OPT_SIGNALS,
    OPT_HELP,
    OPT_VERSION,
};

static const struct option option_table[] = {
    { "device", required_argument, NULL, OPT_DEVICE },
    { "ranks", required_argument, NULL, OPT_RANKS },
    { "hosts", required_argument, NULL, OPT_HOSTS },
    { "netns", required_argument, NULL, OPT_NETNS },
    { "threads", no_argument, NULL, OPT_THREADS },
    { "procs", no_argument, NULL, OPT_PROCS },
    { "mode", required_argument, NULL, OPT_MODE },
    { "layout", required_argument, NULL, OPT_LAYOUT },
    { "tokens", required_argument, NULL, OPT_TOKENS },
    { "hidden", required_argument, NULL, OPT_HIDDEN },
    { "topk", required_argument, NULL, OPT_TOPK },
    { "experts", required_argument, NULL, OPT_EXPERTS },
    { "dtype", required_argument, NULL, OPT_DTYPE },
    { "quantize", optional_argument, NULL, OPT_QUANTIZE },
    { "logfmt", no_argument, NULL, OPT_LOGFMT },
    { "routing", required_argument, NULL, OPT_ROUTING },
    { "workers", required_argument, NULL, OPT_WORKERS },
    { "iters", required_argument, NULL, OPT_ITERS },
    { "warmup", required_argument, NULL, OPT_WARMUP },
    { "in-a-row", required_argument, NULL, OPT_IN_A_ROW },
    { "overlap", required_argument, NULL, OPT_OVERLAP },
    { "seed", required_argument, NULL, OPT_SEED },
    { "soak", required_argument, NULL, OPT_SOAK },
    { "check", no_argument, NULL, OPT_CHECK },
    { "vs", required_argument, NULL, OPT_VS },
    { "json", no_argument, NULL, OPT_JSON },
    { "send-only", no_argument, NULL, OPT_SEND_ONLY },
    { "no-bind", no_argument, NULL, OPT_NO_BIND },
    { "buffers", required_argument, NULL, OPT_BUFFERS },
    { "graph", no_argument, NULL, OPT_GRAPH },
    { "signals", no_argument, NULL, OPT_SIGNALS },
    { "help", no_argument, NULL, OPT_HELP },
    { "version", no_argument, NULL, OPT_VERSION },
    { 0 }
};

/* Options whose value is a plain number: where it goes and what is allowed. */
static bool
set_number(enum option_id id, const char *name, const char *text,
           struct bench_options *o, struct bench_error *error)
{
    const struct {
        enum option_id id;
        uint64_t min;
        uint64_t max;
        int32_t *small_p;
        int64_t *large_p;
    } table[] = {
        { OPT_RANKS, 1, EPX_MAX_RANKS, &o->ranks, NULL },
        { OPT_HOSTS, 1, EPX_MAX_RANKS, &o->hosts, NULL },
        { OPT_HIDDEN, 1, 1 << 24, NULL, &o->hidden },
        { OPT_TOPK, 1, EPX_MAX_TOPK, &o->topk, NULL },
        { OPT_EXPERTS, 1, 1 << 20, &o->experts, NULL },
        { OPT_WORKERS, 1, 1024, &o->workers, NULL },
        { OPT_ITERS, 1, 1000000, &o->iters, NULL },
        { OPT_WARMUP, 0, 1000000, &o->warmup, NULL },
        { OPT_IN_A_ROW, 1, BENCH_MAX_IN_A_ROW, &o->in_a_row, NULL },
        { OPT_OVERLAP, 0, 1000000, &o->overlap_us, NULL },
        { OPT_SOAK, 1, 1000000, &o->soak_s, NULL },
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        uint64_t value = 0;
        if (table[i].id != id) {
            continue;
        }
        if (!parse_number(name, text, table[i].min, table[i].max, &value,
                          error)) {
            return false;
        }
        if (table[i].small_p) {
            *table[i].small_p = (int32_t)value;
        } else {
            *table[i].large_p = (int64_t)value;
        }
        return true;
    }
    return parse_number(name, text, 0, UINT64_MAX, &o->seed, error);
}

static bool
set_word(enum option_id id, const char *name, const char *text,
         struct bench_options *o, struct bench_error *error)
{
    int value = 0;
    switch (id) {
    case OPT_MODE:
        if (!parse_word(name, text, mode_words, &value, error)) {
            return false;
        }
        o->mode = (enum bench_mode)value;
        return true;
    case OPT_LAYOUT:
        if (!parse_word(name, text, layout_words, &value, error)) {
            return false;
        }
        o->layout = (epx_layout_t)value;
        return true;
    case OPT_DTYPE:
        if (!parse_word(name, text, dtype_words, &value, error)) {
            return false;
        }
        o->dtype = (epx_dtype_t)value;
        return true;
    case OPT_QUANTIZE:
        if (!parse_word(name, text ? text : "f32", quantize_words, &value,
                        error)) {
            return false;
        }
        o->quantize = (epx_quantize_t)value;
        return true;
    default:
        if (!parse_word(name, text, buffers_words, &value, error)) {
            return false;
        }
        o->buffers_outside = value != 0;
        return true;
    }
}

static bool
set_option(enum option_id id, const char *name, const char *text,
           struct bench_options *o, struct bench_error *error)
{
    switch (id) {
    case OPT_DEVICE:
        return parse_device(text, o, error);
    case OPT_MODE:
    case OPT_LAYOUT:
    case OPT_DTYPE:
    case OPT_QUANTIZE:
    case OPT_BUFFERS:
        return set_word(id, name, text, o, error);
    case OPT_ROUTING:
        return parse_routing(text, o, error);
    case OPT_TOKENS:
        return parse_tokens(text, o, error);
    case OPT_VS:
        return parse_peers(text, o, error);
    case OPT_THREADS:
    case OPT_PROCS:
        o->procs = id == OPT_PROCS;
        return true;
    case OPT_NETNS:
        o->netns = text;
        return true;
    case OPT_LOGFMT:
        o->logfmt = true;
        return true;
    case OPT_CHECK:
        o->check = true;
        return true;
    case OPT_JSON:
        o->json = true;
        return true;
    case OPT_SEND_ONLY:
        o->send_only = true;
        return true;
    case OPT_NO_BIND:
        o->bind = false;
        return true;
    case OPT_GRAPH:
        o->graph = true;
        return true;
    case OPT_SIGNALS:
        o->signals = true;
        return true;
    default:
        return set_number(id, name, text, o, error);
    }
}

/* On a card, which has some 130 SMs, all ranks' must fit at once. */
static int32_t
default_workers(const struct bench_options *o)
{
    int32_t share = (o->device == EPX_DEVICE_CUDA ? 128 : o->cores) / o->ranks;
    if (o->device == EPX_DEVICE_CUDA && share > 16) {
        return 16;
    }
    return share > 1 ? share : 1;
}

/* What was left open, once everything else is known. */
static void
set_defaults(struct bench_options *o)
{
    bool ll = o->mode == BENCH_LL;
    bool csv = o->routing == BENCH_CSV;
    if (!o->layout) {
        o->layout = ll ? EPX_LAYOUT_EXPERT_SLOTS : EPX_LAYOUT_RANK_MAJOR;
    }
    if (!o->tokens && !csv) {
        o->tokens = o->soak_s ? 64 : ll ? 128 : 4096;
    }
    o->check |= o->soak_s > 0;
    if (!o->topk && !csv) {
        o->topk = 8;
    }
    if (!o->workers) {
        o->workers = default_workers(o);
    }
    if (!o->iters) {
        o->iters = o->check ? 3 : ll ? 500 : 50;
    }
    if (o->warmup < 0) {
        o->warmup = o->check ? 1 : ll ? 20 : 2;
    }
}

static bool
check_device(const struct bench_options *o, struct bench_error *error)
{
    bool cuda = o->device == EPX_DEVICE_CUDA;
    if (o->graph && !cuda) {
        return bench_fail(error, "--graph needs --device cuda");
    }
    if (o->in_a_row > 1 && (!cuda || o->send_only)) {
        return bench_fail(error, "--in-a-row needs --device cuda, and cannot "
                                 "go with --send-only");
    }
    if (o->overlap_us > 0 && !(o->graph && o->send_only)) {
        return bench_fail(error, "--overlap needs --send-only and --graph");
    }
    if (o->signals && (!cuda || o->procs)) {
        return bench_fail(error, "--signals needs --device cuda, and cannot go "
                                 "with --procs");
    }
    if (cuda && !o->procs && o->ranks > MAX_THREADS_ON_CARD) {
        return bench_fail(error,
                          "--ranks is %d; allowed with --device cuda and "
                          "--threads: 1 to %d",
                          o->ranks, MAX_THREADS_ON_CARD);
    }
    return true;
}

static bool
check_netns(const struct bench_options *o, struct bench_error *error)
{
    int32_t names = 1;
    if (!o->netns) {
        return true;
    }
    if (o->hosts == 1 || !o->procs) {
        return bench_fail(error, "--netns needs --procs, and --hosts of 2 or "
                                 "more");
    }
    for (const char *at = o->netns; *at; at++) {
        names += *at == ',';
    }
    if (names != o->hosts) {
        return bench_fail(error,
                          "--netns names %d network namespaces; allowed: "
                          "the %d hosts' with commas between them",
                          names, o->hosts);
    }
    return true;
}

static bool
check_hosts(const struct bench_options *o, struct bench_error *error)
{
    if (o->hosts > o->ranks) {
        return bench_fail(error, "--hosts is %d; allowed: 1 to the %d ranks",
                          o->hosts, o->ranks);
    }
    if (o->vs_ucx && o->device != EPX_DEVICE_CPU) {
        return bench_fail(error, "--vs ucx needs --device cpu");
    }
    if (o->hosts > 1 && o->vs_mpi && o->hosts < o->ranks && !o->netns) {
        return bench_fail(error, "--vs mpi with --hosts needs --netns, or as "
                                 "many hosts as ranks: MPI would not know "
                                 "which ranks share memory");
    }
    if (o->vs_ucx && (o->hosts == 1 || o->send_only)) {
        return bench_fail(error, "--vs ucx needs --hosts of 2 or more, and "
                                 "cannot go with --send-only");
    }
    return check_netns(o, error);
}

static bool
check_nccl(const struct bench_options *o, struct bench_error *error)
{
    if (!o->vs_nccl) {
        return true;
    }
    if (o->device != EPX_DEVICE_CUDA) {
        return bench_fail(error, "--vs nccl needs --device cuda:all");
    }
    if (o->hosts > 1 || o->send_only) {
        return bench_fail(error, "--vs nccl cannot go with --hosts or "
                                 "--send-only");
    }
    if (o->card != BENCH_ALL_CARDS && o->ranks > 1) {
        return bench_fail(error,
                          "--vs nccl needs a card for each rank: %d ranks on "
                          "1 card",
                          o->ranks);
    }
    return true;
}

/* A soak draws what these would fix, and times nothing. */
static bool
check_soak(const struct bench_options *o, struct bench_error *error)
{
    bool times = o->graph || o->signals || o->in_a_row > 1 || o->vs_memcpy ||
                 o->vs_mpi || o->vs_nccl || o->num_token_counts > 1;
    if (o->soak_s &&
        (times || o->routing == BENCH_CSV || o->routing == BENCH_GROUP)) {
        return bench_fail(error, "--soak cannot go with --graph, --signals, "
                                 "--in-a-row, --vs, several --tokens, or a "
                                 "routing by groups or of a file");
    }
    return true;
}

static bool
check_together(const struct bench_options *o, struct bench_error *error)
{
    if (!check_device(o, error) || !check_hosts(o, error) ||
        !check_nccl(o, error) || !check_soak(o, error)) {
        return false;
    }
    if (o->send_only && o->mode != BENCH_LL) {
        return bench_fail(error, "--send-only needs --mode ll");
    }
    if (o->quantize && o->dtype != EPX_BF16) {
        return bench_fail(error, "--quantize needs --dtype bf16, not %s",
                          bench_dtype_name(o->dtype));
    }
    if (o->logfmt && o->dtype != EPX_BF16 && o->dtype != EPX_F8E4M3) {
        return bench_fail(error,
                          "--logfmt needs --dtype bf16 or fp8, where combine "
                          "runs in bf16, not %s",
                          bench_dtype_name(o->dtype));
    }
    if (o->topk > o->experts) {
        return bench_fail(error, "--topk is %d; allowed: 1 to the %d experts",
                          o->topk, o->experts);
    }
    if (o->routing == BENCH_GROUP && o->groups > o->experts) {
        return bench_fail(error, "--routing is '%s'; allowed: 1 to %d groups",
                          o->routing_text, o->experts);
    }
    if (o->routing == BENCH_GROUP &&
        o->groups_per_token * (int64_t)(o->experts / o->groups) < o->topk) {
        return bench_fail(error,
                          "--routing is '%s'; %d groups of %d experts are too "
                          "few for --topk %d",
                          o->routing_text, o->groups_per_token,
                          o->experts / o->groups, o->topk);
    }
    return true;
}

enum bench_parsed
bench_options_parse(int argc, char **argv, int32_t cores,
                    struct bench_options *options, struct bench_error *error)
{
    *options = (struct bench_options){ .ranks = 2,
                                       .hidden = 7168,
                                       .experts = 256,
                                       .dtype = EPX_BF16,
                                       .routing_text = "uniform",
                                       .warmup = -1,
                                       .hosts = 1,
                                       .in_a_row = 1,
                                       .seed = 1,
                                       .bind = true,
                                       .cores = cores };
    /* 0 makes getopt_long start afresh. */
    optind = 0;
    opterr = 0;
    for (;;) {
        int index = 0;
        int id = getopt_long(argc, argv, ":", option_table, &index);
        if (id == -1) {
            break;
        }
        if (id == OPT_HELP) {
            return BENCH_PARSED_HELP;
        }
        if (id == OPT_VERSION) {
            return BENCH_PARSED_VERSION;
        }
        if (id == '?' || id == ':') {
            bench_fail(error, "%s '%s'; see --help",
                       id == ':' ? "a value is missing after"
                                 : "cannot use the option",
                       argv[optind - 1]);
            return BENCH_PARSED_ERROR;
        }
        if (!set_option((enum option_id)id, option_table[index].name, optarg,
                        options, error)) {
            return BENCH_PARSED_ERROR;
        }
    }
    if (optind < argc) {
        bench_fail(error, "cannot use the argument '%s'; see --help",
                   argv[optind]);
        return BENCH_PARSED_ERROR;
    }
    set_defaults(options);
    return check_together(options, error) ? BENCH_PARSED_RUN
                                          : BENCH_PARSED_ERROR;
}
