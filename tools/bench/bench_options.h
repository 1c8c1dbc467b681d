/* SPDX-License-Identifier: MIT */
/* What epx-bench is asked to do. */
#ifndef EPX_BENCH_OPTIONS_H
#define EPX_BENCH_OPTIONS_H

#include "bench_error.h"

#include <epx/epx.h>
#include <stdbool.h>
#include <stdint.h>

enum bench_mode {
    BENCH_HT,
    BENCH_LL,
};

enum bench_routing_kind {
    BENCH_UNIFORM,
    BENCH_ZIPF,
    BENCH_GROUP,
    BENCH_CSV,
};

/* As a card's number: ranks are spread over all of them. */
#define BENCH_ALL_CARDS (-1)

/* A stream takes some hundred calls before it makes its caller wait. */
#define BENCH_MAX_IN_A_ROW 64

/* Numbers of tokens in one run of the program. */
#define BENCH_MAX_COUNTS 32

struct bench_options {
    epx_device_t device;
    int32_t card; /* with EPX_DEVICE_CUDA */
    bool graph;   /* what moves rows is captured and replayed */
    bool signals; /* time what an operation takes at least */
    bool procs;   /* ranks are processes, not threads */
    int32_t ranks;
    enum bench_mode mode;
    epx_layout_t layout;
    int64_t tokens; /* per rank; 0: the routing file's, split evenly */
    /* More of them, measured one after the other; none: just that one. */
    int64_t token_counts[BENCH_MAX_COUNTS];
    int32_t num_token_counts;
    int64_t hidden;
    int32_t topk; /* 0: the routing file's */
    int32_t experts;
    epx_dtype_t dtype;
    epx_quantize_t quantize;
    bool logfmt; /* combine's rows count as LogFMT-10 */
    enum bench_routing_kind routing;
    const char *routing_text; /* as it was given; the path with BENCH_CSV */
    double zipf_exponent;
    int32_t groups;
    int32_t groups_per_token;
    int32_t workers;
    int32_t iters;
    int32_t warmup;
    int32_t hosts;      /* that the ranks play, which only the network joins */
    const char *netns;  /* a name for each host, with commas between; or NULL */
    int32_t in_a_row;   /* on a card: calls that are timed together */
    int32_t overlap_us; /* that lie between a send and its hook, untimed */
    uint64_t seed;
    int32_t soak_s; /* seconds; 0: no soak, which draws shapes up to these */
    bool check;
    bool vs_memcpy;
    bool vs_mpi;
    bool vs_ucx;
    bool vs_nccl;
    bool json;
    bool send_only;
    bool bind;
    bool buffers_outside;
    int32_t cores; /* that this process may use */
};

/* Which of the hosts a rank plays: they have equally many, in blocks. */
static inline int32_t
bench_host_of(const struct bench_options *o, int32_t rank)
{
    return (int32_t)((int64_t)rank * o->hosts / o->ranks);
}

enum bench_parsed {
    BENCH_PARSED_RUN,
    BENCH_PARSED_HELP,
    BENCH_PARSED_VERSION,
    BENCH_PARSED_ERROR, /* the sentence is in *error */
};

/* Prints nothing.  Strings in *options point into argv. */
enum bench_parsed bench_options_parse(int argc, char **argv, int32_t cores,
                                      struct bench_options *options,
                                      struct bench_error *error);

extern const char bench_options_help[];

/* Whether the plan has a fixed capacity, and is updated instead of made anew.
 */
bool bench_options_fixed(const struct bench_options *options);

/* The words that the options use. */
const char *bench_mode_name(enum bench_mode mode);
const char *bench_layout_name(epx_layout_t layout);
const char *bench_dtype_name(epx_dtype_t dtype);
const char *bench_quantize_name(epx_quantize_t quantize); /* NULL for none */

#endif
