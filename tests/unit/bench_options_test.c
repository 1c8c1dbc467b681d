/* SPDX-License-Identifier: MIT */
/* What epx-bench makes of its command line. */
#include "bench_options.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define MAX_ARGS  32
#define NUM_CORES 6

static enum bench_parsed
parse(const char *line, struct bench_options *options,
      struct bench_error *error)
{
    static char text[512];
    char *args[MAX_ARGS] = { text };
    int count = 1;
    snprintf(text, sizeof text, "epx-bench %s", line);
    char *at = strchr(text, ' ');
    while (at && at[1]) {
        *at++ = '\0';
        args[count++] = at;
        assert_true(count < MAX_ARGS);
        at = strchr(at, ' ');
    }
    return bench_options_parse(count, args, NUM_CORES, options, error);
}

static struct bench_options
good(const char *line)
{
    struct bench_options options;
    struct bench_error error = { "" };
    if (parse(line, &options, &error) != BENCH_PARSED_RUN) {
        fail_msg("'%s' is refused: %s", line, error.text);
    }
    return options;
}

/* The sentence must say this much. */
static void
refused(const char *line, const char *part)
{
    struct bench_options options;
    struct bench_error error = { "" };
    if (parse(line, &options, &error) != BENCH_PARSED_ERROR) {
        fail_msg("'%s' is accepted", line);
    }
    if (!strstr(error.text, part)) {
        fail_msg("'%s' is refused with '%s', without '%s'", line, error.text,
                 part);
    }
}

static void
test_defaults(void **state)
{
    (void)state;
    struct bench_options o = good("");
    assert_false(o.procs);
    assert_int_equal(o.ranks, 2);
    assert_int_equal(o.mode, BENCH_HT);
    assert_int_equal(o.layout, EPX_LAYOUT_RANK_MAJOR);
    assert_int_equal(o.tokens, 4096);
    assert_int_equal(o.hidden, 7168);
    assert_int_equal(o.topk, 8);
    assert_int_equal(o.experts, 256);
    assert_int_equal(o.dtype, EPX_BF16);
    assert_int_equal(o.quantize, EPX_QUANTIZE_NONE);
    assert_int_equal(o.routing, BENCH_UNIFORM);
    assert_int_equal(o.workers, 3);
    assert_int_equal(o.iters, 50);
    assert_int_equal(o.seed, 1);
    assert_true(o.bind);
    assert_false(o.check || o.json || o.vs_memcpy || o.vs_mpi || o.send_only ||
                 o.buffers_outside);
}

static void
test_mode_sets_defaults(void **state)
{
    (void)state;
    struct bench_options o = good("--mode ll --ranks 8");
    assert_int_equal(o.layout, EPX_LAYOUT_EXPERT_SLOTS);
    assert_int_equal(o.tokens, 128);
    assert_int_equal(o.workers, 1);
    assert_int_equal(o.iters, 500);
    o = good("--layout rank --tokens 7 --iters 9 --warmup 0 --mode ll");
    assert_int_equal(o.layout, EPX_LAYOUT_RANK_MAJOR);
    assert_int_equal(o.tokens, 7);
    assert_int_equal(o.iters, 9);
    assert_int_equal(o.warmup, 0);
    assert_int_equal(o.num_token_counts, 1);
    o = good("--tokens 1,16777216");
    assert_int_equal(o.tokens, 1);
    assert_int_equal(o.num_token_counts, 2);
    assert_int_equal(o.token_counts[1], 16777216);
    refused("--tokens 1,,2", "--tokens is '1,,2'");
    refused("--tokens 1,16777217", "allowed: 1 to 16777216, or up to 32");
    refused("--signals", "--signals needs --device cuda");
    o = good("--soak 3");
    assert_int_equal(o.soak_s, 3);
    assert_int_equal(o.tokens, 64);
    assert_true(o.check);
    refused("--soak 3 --routing some/file.csv", "--soak");
    o = good("--routing some/file.csv");
    assert_int_equal(o.routing, BENCH_CSV);
    assert_int_equal(o.tokens, 0);
    assert_int_equal(o.topk, 0);
}

static void
test_every_option(void **state)
{
    (void)state;
    struct bench_options o = good(
        "--device cpu --ranks 4 --procs --mode ll --layout expert --tokens 5 "
        "--hidden 64 --topk 3 --experts 12 --dtype bf16 --quantize=ue8m0 "
        "--routing group:4,2 --workers 2 --iters 3 --seed 0 --check");
    assert_true(o.procs && o.check);
    assert_int_equal(o.layout, EPX_LAYOUT_EXPERT_MAJOR);
    assert_int_equal(o.quantize, EPX_QUANTIZE_F8E4M3_UE8M0);
    assert_int_equal(o.routing, BENCH_GROUP);
    assert_int_equal(o.groups, 4);
    assert_int_equal(o.groups_per_token, 2);
    assert_int_equal(o.seed, 0);
    assert_false(o.logfmt);
    o = good("--quantize --logfmt --procs --threads --vs mpi,memcpy --json "
             "--no-bind "
             "--buffers outside --routing zipf:1.25 "
             "--seed 18446744073709551615");
    assert_false(o.procs || o.bind);
    assert_int_equal(o.quantize, EPX_QUANTIZE_F8E4M3_F32);
    assert_true(o.logfmt);
    assert_true(o.vs_mpi && o.vs_memcpy && o.json && o.buffers_outside);
    assert_false(o.vs_ucx);
    assert_float_equal(o.zipf_exponent, 1.25, 0);
    assert_true(o.seed == UINT64_MAX);
    o = good("--hosts 2 --procs --netns a,b --vs ucx,mpi");
    assert_true(o.vs_ucx && o.vs_mpi && o.hosts == 2);
    assert_string_equal(o.netns, "a,b");
}

static void
test_cards(void **state)
{
    (void)state;
    struct bench_options o = good("--device cuda --ranks 2");
    assert_int_equal(o.device, EPX_DEVICE_CUDA);
    assert_int_equal(o.card, 0);
    assert_int_equal(o.workers, 16);
    assert_false(o.graph || bench_options_fixed(&o));
    o = good("--device cuda:3 --ranks 32 --graph");
    assert_int_equal(o.card, 3);
    assert_int_equal(o.workers, 4);
    assert_true(o.graph && bench_options_fixed(&o));
    o = good("--device cuda:all --ranks 512 --procs --mode ll");
    assert_int_equal(o.card, BENCH_ALL_CARDS);
    assert_int_equal(o.workers, 1);
    assert_true(bench_options_fixed(&o));
    assert_false(o.vs_nccl);
    o = good("--device cuda:all --ranks 8 --vs memcpy,nccl --graph");
    assert_true(o.vs_nccl && o.vs_memcpy && !o.vs_ucx);
    o = good("--device cuda:3 --ranks 1 --vs nccl --procs");
    assert_true(o.vs_nccl);
    o = good("--device cuda:1 --device cpu");
    assert_int_equal(o.device, EPX_DEVICE_CPU);
    assert_int_equal(o.workers, 3);
}

static void
test_help_and_version(void **state)
{
    (void)state;
    struct bench_options options;
    struct bench_error error;
    assert_int_equal(parse("--help", &options, &error), BENCH_PARSED_HELP);
    assert_int_equal(parse("--version", &options, &error),
                     BENCH_PARSED_VERSION);
    assert_non_null(strstr(bench_options_help, "--send-only"));
}

static void
test_refused(void **state)
{
    (void)state;
    refused("--device gpu", "'gpu'; allowed: cpu, cuda, cuda:N");
    refused("--device cuda:", "cuda:N");
    refused("--device cuda:-1", "cuda:N");
    refused("--device cuda:99999999999", "cuda:N");
    refused("--device cudax", "cuda:N");
    refused("--graph", "needs --device cuda");
    refused("--overlap 5", "--overlap needs --send-only");
    refused("--device cuda --ranks 33", "1 to 32");
    refused("--ranks 0", "'0'; allowed: 1 to 1024");
    refused("--ranks 1025", "1 to 1024");
    refused("--ranks -1", "1 to 1024");
    refused("--ranks 2x", "1 to 1024");
    refused("--tokens 99999999999999999999", "allowed");
    refused("--topk 65", "1 to 64");
    refused("--mode fast", "ht, ll");
    refused("--layout row", "rank, expert, slots");
    refused("--dtype fp16", "bf16, fp8, f32, f16");
    refused("--quantize=fp4", "f32, pow2, ue8m0");
    refused("--quantize --dtype f32", "needs --dtype bf16");
    refused("--logfmt --dtype f16", "bf16 or fp8");
    refused("--send-only", "--mode ll");
    refused("--vs mpi,", "memcpy, mpi");
    refused("--vs rccl", "memcpy, mpi, ucx and nccl");
    refused("--vs nccl", "--vs nccl needs --device cuda");
    refused("--vs nccl --device cuda", "2 ranks on 1 card");
    refused("--vs nccl --device cuda:3 --ranks 8", "8 ranks on 1 card");
    refused("--vs nccl --device cuda:all --hosts 2", "--hosts");
    refused("--vs nccl --device cuda:all --mode ll --send-only", "--send-only");
    refused("--vs nccl --device cuda:all --soak 3", "--soak");
    refused("--vs ucx", "--vs ucx needs --hosts");
    refused("--vs ucx --hosts 2 --mode ll --send-only", "--send-only");
    refused("--vs mpi --hosts 2 --ranks 4", "--netns");
    refused("--netns a,b", "--netns needs");
    refused("--netns a,b --hosts 2", "--netns needs --procs");
    refused("--netns a,b --hosts 3 --ranks 3 --procs", "names 2");
    refused("--topk 9 --experts 8", "1 to the 8 experts");
    refused("--nonsense", "--nonsense");
    refused("--ranks", "a value is missing");
    refused("extra", "'extra'");
    refused("--buffers here", "epx, outside");
}

static void
test_refused_routing(void **state)
{
    (void)state;
    refused("--routing random", "uniform, zipf:S");
    refused("--routing zipf:", "exponent");
    refused("--routing zipf:-1", "exponent");
    refused("--routing zipf:nan", "exponent");
    refused("--routing zipf:11", "0 to 10");
    refused("--routing group:8", "group:8,4");
    refused("--routing group:0,1", "group:8,4");
    refused("--routing group:4,5", "group:8,4");
    refused("--routing group:4,2x", "group:8,4");
    refused("--routing group:64,1 --experts 32", "1 to 32 groups");
    refused("--routing group:8,1 --experts 32", "too few for --topk 8");
    refused("--routing .csv", "uniform, zipf:S");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_mode_sets_defaults),
        cmocka_unit_test(test_every_option),
        cmocka_unit_test(test_cards),
        cmocka_unit_test(test_help_and_version),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_refused_routing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
