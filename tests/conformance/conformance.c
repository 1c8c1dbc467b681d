/* SPDX-License-Identifier: MIT */
/* Every engine, fabric, layout, element type and option against the oracle. */
#include "conformance/named.h"
#include "conformance/net.h"
#include "conformance/routing_file.h"
#include "conformance/run.h"
#include "conformance/series.h"
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXIT_SKIP = 77, MAX_FAILURES = 5 };

typedef struct options {
    epx_device_t device;
    const char *fabric;
    world_kind_t kind; /* the fabric's */
    uint64_t timeout_s;
    uint64_t max_workers;
    uint64_t num_nodes;
    uint64_t masks;
    net_kind_t net;
    epx_layout_t layout;
    uint64_t first_seed;
    uint64_t num_seeds;
    const char *named; /* "all", a name, or NULL */
    const char *real;  /* folder of routing files, or NULL */
    bool verbose;
    const char *program;
} options_t;

static const char help[] =
    "conformance - compare EPX with the oracle over random shapes\n"
    "\n"
    "  --engine cpu|cuda     what the ranks are (cpu); cuda: all on card 0,\n"
    "                        exits with 77 where there is none\n"
    "  --fabric thread|shm   how the ranks are joined (thread); with cuda\n"
    "                        thread or process\n"
    "  --layout rank_major|expert_major|expert_slots   (rank_major)\n"
    "  --seeds FIRST:COUNT   the shapes to run (1:100)\n"
    "  --named NAME|all      the table of ugly shapes, with these seeds\n"
    "  --real-routing DIR    the *.csv files of DIR, with 4, 7 and 8 ranks;\n"
    "                        EPX_TEST_DATA overrides DIR; exits with 77 when\n"
    "                        there are none\n"
    "  --timeout SECONDS     of the groups (40)\n"
    "  --workers MOST        of a rank's group (4 on the CPU, 8 on a card)\n"
    "  --nodes N             spread the ranks over up to N nodes, which only\n"
    "                        the network joins (1); exits with 77 without UCX\n"
    "  --net ucx|sim|cut     that network (ucx); sim, in conformance_sim: one\n"
    "                        within the process that delays, reorders, "
    "repeats\n"
    "                        and loses for a while, as the shape's seed says;\n"
    "                        cut: then a message vanishes or a rank is cut "
    "off,\n"
    "                        and calls may fail, but not with wrong bits\n"
    "  --masks 0|1           whether some ranks are masked half-way (0)\n"
    "  -v                    print every shape\n"
    "  -h, --help            this text\n"
    "\n"
    "EPX_CONFORMANCE_SEEDS=N in the environment lowers COUNT to at most N, "
    "for\n"
    "runs under a sanitizer.  A failing shape is printed with the command "
    "that\n"
    "runs it again.\n";

/* A decimal number, all of the text up to `end`. */
static bool
parse_number(const char *text, char end, uint64_t *value_p, const char **rest_p)
{
    char *stop;

    errno = 0;
    if (*text < '0' || *text > '9') {
        return false;
    }
    *value_p = strtoull(text, &stop, 10);
    *rest_p = stop + (*stop != '\0');
    return errno == 0 && *stop == end;
}

static int
bad_option(const char *what, const char *value)
{
    fprintf(stderr, "conformance: %s cannot be '%s'; see --help\n", what,
            value);
    return -1;
}

static const char *
engine_name(epx_device_t device)
{
    return device == EPX_DEVICE_CUDA ? "cuda" : "cpu";
}

/* Cards have fabrics of their own; a rank is a thread or a process. */
static int
check_fabric(options_t *options)
{
    const char *processes =
        options->device == EPX_DEVICE_CUDA ? "process" : "shm";

    options->kind =
        strcmp(options->fabric, processes) == 0 ? WORLD_SHM : WORLD_THREAD;
    return options->kind == WORLD_SHM || strcmp(options->fabric, "thread") == 0
               ? 0
               : bad_option("--fabric", options->fabric);
}

/* The simulated network lies within one process. */
static int
check_net(const options_t *options)
{
    return net_exists(options->net) &&
                   (options->net == NET_UCX || options->kind == WORLD_THREAD)
               ? 0
               : bad_option("--net", options->net == NET_UCX ? "ucx" : "sim");
}

static const char *const net_names[] = { "ucx", "sim", "cut" };

static int
take_net(const char *value, options_t *options)
{
    for (int net = NET_UCX; net <= NET_CUT; net++) {
        if (strcmp(value, net_names[net]) == 0 && net_exists((net_kind_t)net)) {
            options->net = (net_kind_t)net;
            return 0;
        }
    }
    return bad_option("--net", value);
}

static int
take_option(int option, const char *value, options_t *options)
{
    const char *rest = "";

    switch (option) {
    case 'f':
        options->fabric = value;
        return 0;
    case 'l':
        for (int layout = EPX_LAYOUT_RANK_MAJOR;
             layout <= EPX_LAYOUT_EXPERT_SLOTS; layout++) {
            if (strcmp(value, layout_name((epx_layout_t)layout)) == 0) {
                options->layout = (epx_layout_t)layout;
                return 0;
            }
        }
        return bad_option("--layout", value);
    case 's':
        return parse_number(value, ':', &options->first_seed, &rest) &&
                       parse_number(rest, '\0', &options->num_seeds, &rest)
                   ? 0
                   : bad_option("--seeds", value);
    case 'n':
        options->named = value;
        return 0;
    case 'r':
        options->real = getenv("EPX_TEST_DATA");
        options->real = options->real ? options->real : value;
        return 0;
    case 'e':
        options->device =
            strcmp(value, "cuda") == 0 ? EPX_DEVICE_CUDA : EPX_DEVICE_CPU;
        return strcmp(value, engine_name(options->device)) == 0
                   ? 0
                   : bad_option("--engine", value);
    case 't':
        return parse_number(value, '\0', &options->timeout_s, &rest) &&
                       options->timeout_s >= 1 && options->timeout_s <= 3600
                   ? 0
                   : bad_option("--timeout", value);
    case 'w':
        return parse_number(value, '\0', &options->max_workers, &rest) &&
                       options->max_workers >= 1 &&
                       options->max_workers <= INT32_MAX
                   ? 0
                   : bad_option("--workers", value);
    case 'N':
        return parse_number(value, '\0', &options->num_nodes, &rest) &&
                       options->num_nodes >= 1 &&
                       options->num_nodes <= WORLD_MAX_RANKS
                   ? 0
                   : bad_option("--nodes", value);
    case 'M':
        return take_net(value, options);
    case 'm':
        return parse_number(value, '\0', &options->masks, &rest) &&
                       options->masks <= 1
                   ? 0
                   : bad_option("--masks", value);
    case 'v':
        options->verbose = true;
        return 0;
    default:
        return -1;
    }
}

/* 0, or -1 when the options are no good, or 1 after --help. */
static int
parse_options(int argc, char **argv, options_t *options)
{
    static const struct option names[] = {
        { "fabric", required_argument, NULL, 'f' },
        { "layout", required_argument, NULL, 'l' },
        { "seeds", required_argument, NULL, 's' },
        { "named", required_argument, NULL, 'n' },
        { "real-routing", required_argument, NULL, 'r' },
        { "engine", required_argument, NULL, 'e' },
        { "timeout", required_argument, NULL, 't' },
        { "workers", required_argument, NULL, 'w' },
        { "nodes", required_argument, NULL, 'N' },
        { "net", required_argument, NULL, 'M' },
        { "masks", required_argument, NULL, 'm' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    const char *limit = getenv("EPX_CONFORMANCE_SEEDS");
    const char *rest;
    uint64_t most;
    int option;

    while ((option = getopt_long(argc, argv, "vh", names, NULL)) != -1) {
        if (option == 'h') {
            fputs(help, stdout);
            return 1;
        }
        if (take_option(option, optarg, options)) {
            return -1;
        }
    }
    if (optind < argc) {
        return bad_option("an argument", argv[optind]);
    }
    if (limit) {
        if (!parse_number(limit, '\0', &most, &rest)) {
            return bad_option("EPX_CONFORMANCE_SEEDS", limit);
        }
        options->num_seeds =
            most < options->num_seeds ? most : options->num_seeds;
    }
    return check_fabric(options) || check_net(options);
}

static void
draw(const options_t *options, shape_t *shape, uint64_t seed,
     const wish_t *wish)
{
    shape_draw(shape, seed, options->layout, wish, options->device);
    shape->timeout_s = options->timeout_s;
    shape->max_workers = (int32_t)options->max_workers;
    shape->num_nodes = (int32_t)options->num_nodes;
    shape->has_masks = options->masks != 0;
}

static void
tell_shape(const options_t *options, const shape_t *shape)
{
    if (options->verbose) {
        shape_print(shape, stdout);
        fflush(stdout);
    }
}

/* The shape, the failures, and how to replay it. */
static void
tell_failure(const options_t *options, const shape_t *shape, const char *text)
{
    printf("FAILED\n");
    shape_print(shape, stdout);
    printf("%s  again: %s --engine %s --fabric %s --layout %s --seeds %llu:1",
           text, options->program, engine_name(options->device),
           options->fabric, layout_name(options->layout),
           (unsigned long long)shape->seed);
    if (options->num_nodes > 1) {
        printf(" --nodes %llu --net %s", (unsigned long long)options->num_nodes,
               net_names[options->net]);
    }
    if (options->masks) {
        printf(" --masks 1");
    }
    if (options->real) {
        printf(" --real-routing %s", options->real);
    } else if (shape->name) {
        printf(" --named %s", shape->name);
    }
    printf("\n");
    fflush(stdout);
}

static void *
take(size_t count, size_t bytes)
{
    void *memory = calloc(count ? count : 1, bytes);

    if (!memory) {
        perror("conformance");
        abort();
    }
    return memory;
}

static bool
run_alone(const options_t *options, uint64_t seed, const wish_t *wish)
{
    char text[WORLD_MAX_RANKS * 256];
    shape_t *shape = take(1, sizeof(*shape));
    bool ok;

    draw(options, shape, seed, wish);
    tell_shape(options, shape);
    net_open(options->net, seed, shape->num_ranks);
    ok = world_run(options->kind, shape->num_ranks, shape->own_bootstrap, 0,
                   run_rank, shape, NULL, text, sizeof(text));
    net_close(options->net);
    if (!ok) {
        tell_failure(options, shape, text);
    }
    free(shape);
    return ok;
}

/* Those seeds whose shapes have so many ranks. */
static uint64_t
run_together(const options_t *options, const wish_t *wish, int32_t num_ranks,
             uint64_t most_failures)
{
    char text[WORLD_MAX_RANKS * 256];
    shape_t *shapes = take(options->num_seeds, sizeof(*shapes));
    uint64_t failures = 0;
    uint64_t count = 0;

    for (uint64_t i = 0; i < options->num_seeds; i++) {
        shape_t *shape = &shapes[count];

        draw(options, shape, options->first_seed + i, wish);
        if (shape->num_ranks == num_ranks) {
            tell_shape(options, shape);
            count++;
        }
    }
    for (uint64_t i = 0; i < count && failures < most_failures; i++) {
        i += series_run(options->kind, shapes + i, count - i, text,
                        sizeof(text));
        if (i < count) {
            tell_failure(options, &shapes[i], text);
            failures++;
        }
    }
    free(shapes);
    return failures;
}

static uint64_t
run_seeds(const options_t *options, const wish_t *wish)
{
    uint64_t failures = 0;

    /* CUDA takes long to set up in a process. */
    if (options->device == EPX_DEVICE_CUDA && options->kind == WORLD_SHM) {
        for (int32_t r = 1; r <= WORLD_MAX_RANKS; r++) {
            failures += run_together(options, wish, r, MAX_FAILURES - failures);
        }
        return failures;
    }
    for (uint64_t i = 0; i < options->num_seeds && failures < MAX_FAILURES;
         i++) {
        failures += !run_alone(options, options->first_seed + i, wish);
    }
    return failures;
}

static int
run_named(const options_t *options)
{
    bool all = strcmp(options->named, "all") == 0;
    uint64_t failures = 0;
    int found = 0;

    for (const wish_t *wish = named_shapes; wish->name; wish++) {
        if (all || strcmp(wish->name, options->named) == 0) {
            failures += run_seeds(options, wish);
            found++;
        }
    }
    if (found == 0) {
        bad_option("--named", options->named);
        return EXIT_FAILURE;
    }
    printf("%d named shapes with %llu seeds: %llu failed\n", found,
           (unsigned long long)options->num_seeds,
           (unsigned long long)failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

static int
run_real(const options_t *options)
{
    static const int32_t ranks[] = { 4, 7, 8 };
    routing_file_t files[8];
    uint64_t failures = 0;
    int num_files = routing_files_read(options->real, files, 8);

    if (num_files <= 0) {
        printf("SKIPPED: no routing files (*.csv) in %s\n", options->real);
        return num_files < 0 ? EXIT_FAILURE : EXIT_SKIP;
    }
    for (int f = 0; f < num_files; f++) {
        for (int i = 0; i < 3; i++) {
            const wish_t wish = { .name = "real-routing",
                                  .file = &files[f],
                                  .ranks = ranks[i],
                                  .plans = 1,
                                  .batches = 1,
                                  .row_bytes = 64 };

            failures += run_seeds(options, &wish);
        }
        free(files[f].topk_idx);
    }
    printf("%d files with 4, 7 and 8 ranks: %llu failed\n", num_files,
           (unsigned long long)failures);
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}

static void
join_network(world_rank_t *self, void *context)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;
    epx_network_config_t network = EPX_NETWORK_CONFIG_INIT;
    epx_group_t *group;

    (void)context;
    config.bootstrap = self->bootstrap;
    config.heap_bytes = 1 << 20;
    config.node = self->rank + 1;
    config.network = &network;
    network.device = "lo";
    if (!world_failed(self, epx_group_create(&config, &group),
                      "epx_group_create")) {
        epx_group_destroy(group);
    }
}

/* Whether ranks cannot be joined by the network, which is tried in processes
 * of their own. */
static const char *
network_obstacle(void)
{
    static char text[1024];
    bool ok = world_run(WORLD_SHM, 2, true, 0, join_network, NULL, NULL, text,
                        sizeof(text));

    return ok || !strstr(text, "UNSUPPORTED") ? NULL : text;
}

int
main(int argc, char **argv)
{
    static const wish_t no_wish = { 0 };
    options_t options = { .fabric = "thread",
                          .timeout_s = 40,
                          .max_workers = INT32_MAX,
                          .num_nodes = 1,
                          .layout = EPX_LAYOUT_RANK_MAJOR,
                          .first_seed = 1,
                          .num_seeds = 100,
                          .program = argv[0] };
    int parsed = parse_options(argc, argv, &options);
    const char *obstacle;
    uint64_t failures;

    if (parsed != 0) {
        return parsed < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
    }
    obstacle = options.num_nodes > 1 && options.net == NET_UCX
                   ? network_obstacle()
                   : NULL;
    if (!obstacle) {
        obstacle = memory_obstacle(options.device);
    }
    if (obstacle) {
        printf("SKIPPED: %s\n", obstacle);
        return EXIT_SKIP;
    }
    world_patience_s = 5 * (uint32_t)options.timeout_s;
    if (options.real) {
        return run_real(&options);
    }
    if (options.named) {
        return run_named(&options);
    }
    failures = run_seeds(&options, &no_wish);
    printf("%llu shapes: %llu failed\n", (unsigned long long)options.num_seeds,
           (unsigned long long)failures);
    if (options.net == NET_CUT) {
        printf("%u calls told of a lost peer\n", world_num_lost);
    }
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
