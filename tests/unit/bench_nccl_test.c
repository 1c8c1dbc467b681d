/* SPDX-License-Identifier: MIT */
/* What --vs nccl asks of NCCL, by a library in its place and a card that is
 * memory of the host. */
#include "bench_nccl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define RANKS 3

static void *
fake_take(struct bench_card *card, size_t bytes)
{
    (void)card;
    return malloc(bytes);
}

static void
fake_give_back(struct bench_card *card, void *ptr)
{
    (void)card;
    free(ptr);
}

static void
fake_upload(struct bench_card *card, void *to, const void *from, size_t bytes)
{
    (void)card;
    memcpy(to, from, bytes);
}

static void
fake_synchronize(struct bench_card *card)
{
    (void)card;
}

static void
fake_forget(struct bench_card *card, enum bench_op op)
{
    (void)card, (void)op;
}

static const struct bench_card_ops fake_ops = {
    .take = fake_take,
    .give_back = fake_give_back,
    .upload = fake_upload,
    .synchronize = fake_synchronize,
    .forget = fake_forget,
};

struct party {
    const struct bench_run *run;
    int32_t rank;
    pthread_t thread;
};

/* Opening moves all once, both ways. */
static void *
party_main(void *arg)
{
    const struct party *self = arg;
    struct bench_card card = { .ops = &fake_ops, .rank = self->rank };
    const struct bench_rank rank = { .run = self->run,
                                     .rank = self->rank,
                                     .card = &card };
    struct bench_nccl *nccl = bench_nccl_open(&rank);
    bench_nccl_start(nccl, BENCH_NCCL_DISPATCH);
    bench_nccl_close(nccl);
    return NULL;
}

static void
run_parties(const struct bench_run *run)
{
    struct party parties[RANKS];
    for (int32_t r = 0; r < RANKS; r++) {
        parties[r] = (struct party){ .run = run, .rank = r };
        assert_int_equal(
            pthread_create(&parties[r].thread, NULL, party_main, &parties[r]),
            0);
    }
    for (int32_t r = 0; r < RANKS; r++) {
        pthread_join(parties[r].thread, NULL);
    }
}

/* Two dispatches and a combine. */
static void
expect_moved(const struct bench_run *run)
{
    size_t (*moved)(int, int);
    void *library = dlopen("libnccl.so.2", RTLD_NOW);
    assert_non_null(library);
    *(void **)&moved = dlsym(library, "nccl_fake_moved");
    assert_non_null(moved);
    for (int32_t r = 0; r < RANKS; r++) {
        int64_t to[RANKS];
        int64_t from[RANKS];
        assert_true(bench_shape_rows(run->routing, r, to, from));
        for (int32_t peer = 0; peer < RANKS; peer++) {
            assert_int_equal(moved(r, peer),
                             2 * (uint64_t)to[peer] *
                                     bench_shape_row_bytes(&run->shape, false) +
                                 (uint64_t)from[peer] *
                                     bench_shape_row_bytes(&run->shape, true));
        }
    }
    dlclose(library);
}

static void
test_rows(void **state)
{
    static const epx_layout_t layouts[] = { EPX_LAYOUT_RANK_MAJOR,
                                            EPX_LAYOUT_EXPERT_MAJOR,
                                            EPX_LAYOUT_EXPERT_SLOTS };
    (void)state;
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        /* With one token there are ranks that get nothing of another. */
        for (int64_t tokens = 1; tokens < 200; tokens += 99) {
            const struct bench_options o = { .ranks = RANKS,
                                             .hosts = 1,
                                             .layout = layouts[i],
                                             .tokens = tokens,
                                             .hidden = 144,
                                             .topk = 2,
                                             .experts = 8,
                                             .dtype = EPX_F8E4M3,
                                             .workers = 1,
                                             .iters = 1,
                                             .cores = 1,
                                             .vs_nccl = true };
            struct bench_routing routing;
            struct bench_run run;
            struct bench_error error = { "" };
            if (!bench_routing_open(&routing, &o, &error) ||
                !bench_run_open(&run, &o, &routing, &error)) {
                fail_msg("%s", error.text);
            }
            run_parties(&run);
            expect_moved(&run);
            bench_run_close(&run);
            bench_routing_close(&routing);
        }
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
