/* SPDX-License-Identifier: MIT */
#include "bench_report.h"

#include <math.h>
#include <string.h>

/* Text between quotes; bytes that JSON does not allow there are escaped. */
static void
put_text(FILE *file, const char *key, const char *text)
{
    fprintf(file, "\"%s\": ", key);
    if (!text) {
        fputs("null", file);
        return;
    }
    putc('"', file);
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte == '"' || byte == '\\') {
            fprintf(file, "\\%c", byte);
        } else if (byte < 0x20 || byte == 0x7f) {
            fprintf(file, "\\u%04x", byte);
        } else {
            putc(byte, file);
        }
    }
    putc('"', file);
}

static void
put_number(FILE *file, const char *key, double value, int digits)
{
    if (isnan(value)) {
        fprintf(file, "\"%s\": null", key);
    } else {
        fprintf(file, "\"%s\": %.*f", key, digits, value);
    }
}

static void
put_whole(FILE *file, const char *key, int64_t value)
{
    fprintf(file, "\"%s\": %lld", key, (long long)value);
}

static double
bytes_or_nan(uint64_t bytes)
{
    return bytes ? (double)bytes : NAN;
}

void
bench_report_json(FILE *file, const struct bench_run *run,
                  const struct bench_line *line)
{
    const struct bench_options *o = run->options;
    const struct {
        const char *key;
        enum { TEXT, WHOLE, DOUBLE } kind;
        const char *text;
        int64_t whole;
        double value;
        int digits;
    } fields[] = {
        { "op", TEXT, line->op, 0, 0, 0 },
        { "engine", TEXT, run->shared->engine, 0, 0, 0 },
        { "fabric", TEXT, run->shared->fabric, 0, 0, 0 },
        { "mode", TEXT, bench_mode_name(o->mode), 0, 0, 0 },
        { "ranks", WHOLE, NULL, o->ranks, 0, 0 },
        { "tokens", WHOLE, NULL, run->routing->max_tokens, 0, 0 },
        { "hidden", WHOLE, NULL, o->hidden, 0, 0 },
        { "topk", WHOLE, NULL, run->routing->topk, 0, 0 },
        { "experts", WHOLE, NULL, o->experts, 0, 0 },
        { "dtype", TEXT, bench_dtype_name(o->dtype), 0, 0, 0 },
        { "workers", WHOLE, NULL, o->workers, 0, 0 },
        { "iters", WHOLE, NULL, o->iters, 0, 0 },
        { "min_us", DOUBLE, NULL, 0, line->times.min, 3 },
        { "p50_us", DOUBLE, NULL, 0, line->times.p50, 3 },
        { "p99_us", DOUBLE, NULL, 0, line->times.p99, 3 },
        { "bytes_moved", DOUBLE, NULL, 0, bytes_or_nan(line->bytes_moved), 0 },
        { "gbps", DOUBLE, NULL, 0, line->gbps, 3 },
        { "ceiling_gbps", DOUBLE, NULL, 0, line->ceiling_gbps, 3 },
        { "ratio_ceiling", DOUBLE, NULL, 0, line->ratio_ceiling, 4 },
        { "peer", TEXT, line->peer, 0, 0, 0 },
        { "peer_p50_us", DOUBLE, NULL, 0, line->peer_p50, 3 },
        { "ratio_peer", DOUBLE, NULL, 0, line->ratio_peer, 4 },
        { "layout", TEXT, bench_layout_name(o->layout), 0, 0, 0 },
        { "quantize", TEXT, bench_quantize_name(o->quantize), 0, 0, 0 },
        { "routing", TEXT, o->routing_text, 0, 0, 0 },
        { "launch", TEXT, o->graph ? "graph" : "call", 0, 0, 0 },
        { "in_a_row", WHOLE, NULL, o->in_a_row, 0, 0 },
        { "hosts", WHOLE, NULL, o->hosts, 0, 0 },
        { "sms", DOUBLE, NULL, 0, line->sms, 0 },
        { "sm_us", DOUBLE, NULL, 0, line->sms * line->times.p50, 1 },
        { "net_bytes", DOUBLE, NULL, 0, bytes_or_nan(line->net_bytes), 0 },
        { "wire_bytes", DOUBLE, NULL, 0, bytes_or_nan(line->wire_bytes), 0 },
        { "peer_way", TEXT, line->peer_way, 0, 0, 0 },
        { "combine_quantize", TEXT, o->logfmt ? "logfmt10" : NULL, 0, 0, 0 },
        { "overlap_us", WHOLE, NULL, o->overlap_us, 0, 0 },
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        fputs(i ? ", " : "{", file);
        if (fields[i].kind == TEXT) {
            put_text(file, fields[i].key, fields[i].text);
        } else if (fields[i].kind == WHOLE) {
            put_whole(file, fields[i].key, fields[i].whole);
        } else {
            put_number(file, fields[i].key, fields[i].value, fields[i].digits);
        }
    }
    fputs("}\n", file);
}

static void
put_cell(FILE *file, double value, int width, int digits)
{
    if (isnan(value)) {
        fprintf(file, " %*s", width, "-");
    } else {
        fprintf(file, " %*.*f", width, digits, value);
    }
}

static void
put_row(FILE *file, const struct bench_line *line)
{
    fprintf(file, "%-13s", line->op);
    put_cell(file, line->times.min, 10, 1);
    put_cell(file, line->times.p50, 10, 1);
    put_cell(file, line->times.p99, 10, 1);
    put_cell(file, line->bytes_moved ? (double)line->bytes_moved / 1e6 : NAN, 9,
             2);
    put_cell(file, line->gbps, 8, 2);
    put_cell(file, line->ratio_ceiling, 8, 2);
    fprintf(file, "  %-6s", line->peer ? line->peer : "-");
    put_cell(file, line->peer_p50, 10, 1);
    put_cell(file, line->ratio_peer, 7, 2);
    putc('\n', file);
}

static void
put_heading(FILE *file, const struct bench_run *run)
{
    const struct bench_options *o = run->options;
    const char *quantize = bench_quantize_name(o->quantize);
    char hosts[32] = "";
    if (o->hosts > 1) {
        snprintf(hosts, sizeof hosts, " on %d hosts", o->hosts);
    }
    fprintf(file,
            "%s engine, %s fabric: %d ranks x %d workers%s, %s, layout %s\n"
            "each %lld tokens x %lld %s%s%s%s, top-%d of %d experts, %s; "
            "%d iterations%s%s\n\n"
            "%-13s %10s %10s %10s %9s %8s %8s  %-6s %10s %7s\n",
            run->shared->engine, run->shared->fabric, o->ranks, o->workers,
            hosts, bench_mode_name(o->mode), bench_layout_name(o->layout),
            (long long)run->routing->max_tokens, (long long)o->hidden,
            bench_dtype_name(o->dtype), quantize ? " sent as fp8, scales " : "",
            quantize ? quantize : "",
            o->logfmt ? ", combined in LogFMT-10" : "", run->routing->topk,
            o->experts, o->routing_text, o->iters,
            o->check ? ", after as many that were checked" : "",
            o->graph ? ", in CUDA graphs" : "", "", "min us", "p50 us",
            "p99 us", "MB", "GB/s", "of copy", "peer", "its p50", "faster");
}

/* What it would take to copy as many bytes on the cards that are used. */
static bool
card_copy(const struct bench_run *run, enum bench_op op, double *p50_p)
{
    struct bench_times times;
    double bytes = 2.0 * (double)BENCH_CARD_COPY_BYTES * run->shared->num_cards;
    if (!bench_series_times(&run->shared->card_copies, &times)) {
        return false;
    }
    *p50_p =
        run->op_bytes[op] ? times.p50 * (double)run->op_bytes[op] / bytes : NAN;
    return true;
}

/* The better of the two ways to copy. */
static bool
best_copy(const struct bench_run *run, enum bench_op op, double *p50_p)
{
    *p50_p = NAN;
    if (run->options->device == EPX_DEVICE_CUDA) {
        return card_copy(run, op, p50_p);
    }
    for (int kind = 0; kind < BENCH_NUM_COPIES; kind++) {
        struct bench_times times;
        const struct bench_series *series = &run->shared->copies[op][kind];
        if (!bench_series_times(series, &times)) {
            return false;
        }
        if (series->count && !(times.p50 >= *p50_p)) {
            *p50_p = times.p50;
        }
    }
    return true;
}

/* The better of UCX's ways. */
static bool
best_transfer(const struct bench_run *run, enum bench_op op, double *p50_p,
              const char **way_p)
{
    static const char *const names[BENCH_NUM_WAYS] = { "eager", "rendezvous",
                                                       "put" };
    *p50_p = NAN;
    *way_p = NULL;
    for (int way = 0; way < BENCH_NUM_WAYS; way++) {
        struct bench_times times;
        const struct bench_series *series = &run->shared->transfers[op][way];
        if (!bench_series_times(series, &times)) {
            return false;
        }
        if (series->count && !(times.p50 >= *p50_p)) {
            *p50_p = times.p50;
            *way_p = names[way];
        }
    }
    return true;
}

/* NCCL's, NAN where it was not measured. */
static bool
nccl_transfer(const struct bench_run *run, enum bench_op op, double *p50_p)
{
    struct bench_times times;
    const struct bench_series *series =
        &run->shared->ops[op == BENCH_DISPATCH ? BENCH_NCCL_DISPATCH
                                               : BENCH_NCCL_COMBINE];
    *p50_p = NAN;
    if ((op != BENCH_DISPATCH && op != BENCH_COMBINE) || !series->count) {
        return true;
    }
    if (!bench_series_times(series, &times)) {
        return false;
    }
    *p50_p = times.p50;
    return true;
}

static bool
make_line(struct bench_line *line, const struct bench_run *run,
          enum bench_op op, double copy_p50)
{
    const struct bench_options *o = run->options;
    double copied =
        o->device == EPX_DEVICE_CUDA
            ? (double)run->op_bytes[op]
            : 2.0 * (double)bench_run_copied(run, op) * o->ranks * o->workers;
    *line = (struct bench_line){ .op = bench_op_name(op),
                                 .bytes_moved = run->op_bytes[op],
                                 .sms = run->shared->num_blocks[op]
                                            ? run->shared->num_blocks[op]
                                            : NAN,
                                 .net_bytes = run->net_bytes[op],
                                 .wire_bytes = run->shared->wire_bytes[op],
                                 .peer_p50 = NAN,
                                 .ratio_peer = NAN };
    if (!bench_series_times(&run->shared->ops[op], &line->times)) {
        return false;
    }
    line->gbps = line->bytes_moved
                     ? (double)line->bytes_moved / (line->times.p50 * 1e3)
                     : NAN;
    line->ceiling_gbps = copied / (copy_p50 * 1e3);
    line->ratio_ceiling = line->gbps / line->ceiling_gbps;
    return true;
}

static void
put_line(FILE *file, const struct bench_run *run, struct bench_line line,
         const char *peer, double peer_p50)
{
    line.peer = peer;
    line.peer_p50 = peer_p50;
    line.ratio_peer = peer_p50 / line.times.p50;
    if (run->options->json) {
        bench_report_json(file, run, &line);
    } else {
        put_row(file, &line);
    }
}

/* What crossed the network, beside what had to. */
static void
put_wire(FILE *file, const struct bench_run *run)
{
    putc('\n', file);
    for (int op = 0; op < BENCH_NUM_OPS; op++) {
        if (run->net_bytes[op] &&
            bench_op_active((enum bench_op)op, run->options)) {
            fprintf(file,
                    "%-13s %.2f MB of rows cross the network; the interfaces "
                    "sent %.2f MB\n",
                    bench_op_name((enum bench_op)op),
                    (double)run->net_bytes[op] / 1e6,
                    (double)run->shared->wire_bytes[op] / 1e6);
        }
    }
}

static double
mpi_p50(const struct bench_peer *mpi, enum bench_op op)
{
    if (!mpi->ran || (op != BENCH_DISPATCH && op != BENCH_COMBINE)) {
        return NAN;
    }
    return op == BENCH_DISPATCH ? mpi->dispatch.p50 : mpi->combine.p50;
}

bool
bench_report_write(FILE *file, const struct bench_run *run,
                   const struct bench_peer *mpi)
{
    const struct bench_options *o = run->options;
    if (!o->json) {
        put_heading(file, run);
    }
    for (int i = 0; i < BENCH_NUM_OPS; i++) {
        enum bench_op op = (enum bench_op)i;
        struct bench_line line;
        double copy_p50;
        double ucx_p50;
        double nccl_p50;
        const char *way;
        if (!bench_op_active(op, o)) {
            continue;
        }
        if (!best_copy(run, op, &copy_p50) ||
            !best_transfer(run, op, &ucx_p50, &way) ||
            !nccl_transfer(run, op, &nccl_p50) ||
            !make_line(&line, run, op, copy_p50)) {
            return false;
        }
        if (!o->vs_memcpy && !o->vs_mpi && !o->vs_ucx && !o->vs_nccl) {
            put_line(file, run, line, NULL, NAN);
        }
        if (o->vs_memcpy) {
            put_line(file, run, line, "memcpy", copy_p50);
        }
        if (o->vs_mpi) {
            put_line(file, run, line, "mpi", mpi_p50(mpi, op));
        }
        if (o->vs_ucx) {
            line.peer_way = way;
            put_line(file, run, line, "ucx", ucx_p50);
            line.peer_way = NULL;
        }
        if (o->vs_nccl) {
            put_line(file, run, line, "nccl", nccl_p50);
        }
    }
    if (!o->json && o->hosts > 1) {
        put_wire(file, run);
    }
    return true;
}
