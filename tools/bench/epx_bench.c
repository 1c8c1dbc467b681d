/* SPDX-License-Identifier: MIT */
/* epx-bench: how fast the plan, dispatch and combine run here. */
#include "bench_card.h"
#include "bench_launch.h"
#include "bench_measure.h"
#include "bench_report.h"
#include "bench_soak.h"

enum {
    STATUS_OK = 0,
    STATUS_FAILED = 1,
    STATUS_USAGE = 2,
};

static int
complain(int status, const struct bench_error *error)
{
    if (error->text[0]) {
        fprintf(stderr, "epx-bench: %s\n", error->text);
    }
    return status;
}

static int
run_all(const struct bench_options *options,
        const struct bench_routing *routing)
{
    struct bench_error error = { "" };
    struct bench_run run;
    struct bench_peer mpi = { 0 };
    if (!bench_run_open(&run, options, routing, &error)) {
        return complain(STATUS_FAILED, &error);
    }
    if (!bench_launch(&run,
                      options->soak_s ? bench_soak_rank : bench_measure_rank,
                      &error)) {
        bench_run_close(&run);
        return complain(STATUS_FAILED, &error);
    }
    if (options->vs_mpi && !bench_peer_run(&run, &mpi, &error)) {
        fprintf(stderr, "epx-bench: no figures of the mpi peer: %s\n",
                error.text);
    }
    int status = STATUS_OK;
    if (options->soak_s) {
        bench_soak_report(stdout, &run);
    } else if (!bench_report_write(stdout, &run, &mpi)) {
        bench_fail(&error, "no memory for the report");
        status = complain(STATUS_FAILED, &error);
    }
    if (!status && (fflush(stdout) || ferror(stdout))) {
        bench_fail(&error, "the report cannot be written");
        status = complain(STATUS_FAILED, &error);
    }
    bench_run_close(&run);
    return status;
}

static int
run_once(const struct bench_options *options)
{
    struct bench_error error;
    struct bench_routing routing;
    if (options->device == EPX_DEVICE_CUDA && !bench_card_cuda) {
        bench_fail(&error, "this epx-bench was built without CUDA");
        return complain(STATUS_FAILED, &error);
    }
    if (!bench_routing_open(&routing, options, &error)) {
        return complain(STATUS_USAGE, &error);
    }
    int status = run_all(options, &routing);
    bench_routing_close(&routing);
    return status;
}

/* For each number of tokens that was asked for. */
static int
run_with(struct bench_options *options)
{
    int status = run_once(options);
    for (int32_t i = 1; !status && i < options->num_token_counts; i++) {
        options->tokens = options->token_counts[i];
        if (!options->json) {
            putchar('\n');
        }
        status = run_once(options);
    }
    return status;
}

int
main(int argc, char **argv)
{
    struct bench_options options;
    struct bench_error error;
    epx_library_info_t info = EPX_LIBRARY_INFO_INIT;
    switch (bench_options_parse(argc, argv, bench_usable_cores(), &options,
                                &error)) {
    case BENCH_PARSED_HELP:
        fputs(bench_options_help, stdout);
        return fflush(stdout) ? STATUS_FAILED : STATUS_OK;
    case BENCH_PARSED_VERSION:
        if (epx_library_query(&info)) {
            bench_fail(&error, "%s", epx_last_error());
            return complain(STATUS_FAILED, &error);
        }
        printf("epx-bench %s\n", info.version);
        return fflush(stdout) ? STATUS_FAILED : STATUS_OK;
    case BENCH_PARSED_ERROR:
        return complain(STATUS_USAGE, &error);
    case BENCH_PARSED_RUN:
        break;
    }
    return run_with(&options);
}
