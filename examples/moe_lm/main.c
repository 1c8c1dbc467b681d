/* SPDX-License-Identifier: MIT */
/*
 * Trains a small Mixture-of-Experts language model on the bytes of a text, with
 * its experts spread over the ranks that a launcher started:
 *
 *     epx-run -n 4 moe_lm --log four.csv
 */
#include "check.h"
#include "gradcheck.h"
#include "train.h"

#include <errno.h>
#include <getopt.h>

static const char *const usage =
    "usage: moe_lm [options], under a launcher such as epx-run -n RANKS\n"
    "  --text PATH   a file, or a directory whose files are the text\n"
    "                (default: /usr/share/common-licenses)\n"
    "  --steps N     training steps (default: 200)\n"
    "  --seed N      of the weights and of the batches (default: 1)\n"
    "  --log FILE    rank 0 writes its log there, for moe_lm_report\n"
    "  --gradcheck   check the gradients of a tiny model, and end\n"
    "  --help        print this, and end\n";

typedef struct options {
    const char *text;
    const char *log;
    int64_t steps;
    int64_t seed;
    int gradcheck;
} options_t;

static int64_t
parse_number(const char *name, const char *value, int64_t least)
{
    char *end;
    long long number;

    errno = 0;
    number = strtoll(value, &end, 10);
    if (errno != 0 || end == value || *end != '\0' || number < least ||
        number > 1000000000) {
        fprintf(stderr,
                "moe_lm: --%s is %s; it must be a number in "
                "%lld..1000000000\n",
                name, value, (long long)least);
        exit(EXIT_FAILURE);
    }
    return number;
}

static options_t
parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        { "text", required_argument, NULL, 't' },
        { "steps", required_argument, NULL, 'n' },
        { "seed", required_argument, NULL, 's' },
        { "log", required_argument, NULL, 'l' },
        { "gradcheck", no_argument, NULL, 'g' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    options_t options = { .text = "/usr/share/common-licenses",
                          .steps = 200,
                          .seed = 1 };
    int option;

    while ((option = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (option) {
        case 't':
            options.text = optarg;
            break;
        case 'n':
            options.steps = parse_number("steps", optarg, 1);
            break;
        case 's':
            options.seed = parse_number("seed", optarg, 0);
            break;
        case 'l':
            options.log = optarg;
            break;
        case 'g':
            options.gradcheck = 1;
            break;
        case 'h':
            fputs(usage, stdout);
            exit(EXIT_SUCCESS);
        default:
            fputs(usage, stderr);
            exit(EXIT_FAILURE);
        }
    }
    if (optind < argc) {
        fprintf(stderr, "moe_lm: unexpected argument %s\n%s", argv[optind],
                usage);
        exit(EXIT_FAILURE);
    }
    return options;
}

static int
run_training(epx_group_t *group, const config_t *config,
             const options_t *options, int leader)
{
    text_t text;
    FILE *log = NULL;
    int result = EXIT_FAILURE;

    if (text_load(options->text, config->seq_len + 1, &text) != 0) {
        if (leader) {
            fprintf(stderr, "moe_lm: %s\n", text.error);
        }
        goto done;
    }
    if (leader && options->log != NULL) {
        log = fopen(options->log, "w");
        if (log == NULL) {
            fprintf(stderr, "moe_lm: cannot write %s: %m\n", options->log);
            goto done;
        }
    }
    train(group, config, &text, options->steps, log);
    result = EXIT_SUCCESS;
    if (log != NULL && fclose(log) != 0) {
        fprintf(stderr, "moe_lm: cannot write %s: %m\n", options->log);
        result = EXIT_FAILURE;
    }

done:
    text_free(&text);
    return result;
}

int
main(int argc, char **argv)
{
    const options_t options = parse_options(argc, argv);
    const config_t config = { .dim = 64,
                              .expert_dim = 128,
                              .num_experts = 16,
                              .topk = 2,
                              .num_layers = 2,
                              .taps = 8,
                              .seq_len = 128,
                              .num_seqs = 16,
                              .num_shards = 4,
                              .balance = 0.03f,
                              .seed = (uint64_t)options.seed };
    epx_group_config_t group_config = EPX_GROUP_CONFIG_INIT;
    epx_group_info_t info = EPX_GROUP_INFO_INIT;
    epx_group_t *group;
    int result;

    CHECK(epx_group_create(&group_config, &group));
    CHECK(epx_group_query(group, &info));
    if (info.num_ranks > config.num_shards) {
        if (info.rank == 0) {
            fprintf(stderr,
                    "moe_lm: there are %d ranks, but the batch has shards for "
                    "%d at most\n",
                    info.num_ranks, config.num_shards);
        }
        result = EXIT_FAILURE;
    } else if (options.gradcheck) {
        result =
            gradcheck(group, config.seed) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
    } else {
        result = run_training(group, &config, &options, info.rank == 0);
    }
    CHECK(epx_group_destroy(group));
    return result;
}
