/* SPDX-License-Identifier: MIT */
/*
 * moe_lm_report A.csv B.csv: shows two trainings of the same model on different
 * numbers of ranks side by side, and fails unless they agree and have learned.
 */
#include "report_log.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/*
 * How far the losses of a step may be apart.  Floating point sums depend on
 * their order, and spreading work over ranks usually changes it; here it does
 * not.  A token's numbers are computed by the same operations on any rank, its
 * experts' answers are summed in the order of k, an expert's gradient over the
 * tokens of the batch in their order, and the replicated gradients in the order
 * of the batch's shards.  With no sum reordered there is nothing to allow for.
 */
#define ALLOWED_DIFFERENCE 0.0

/* The share of the unigram entropy that the last losses may reach.  A model
 * that knows only frequencies cannot get below 1, one that sees the byte before
 * reaches about 0.7. */
#define ALLOWED_SHARE 0.6

#define CURVE_WIDTH  64
#define CURVE_HEIGHT 14
#define BAR_WIDTH    24

static double
bits(double nats)
{
    return nats / log(2);
}

/* Mean loss, in bits, of steps begin .. end - 1. */
static double
mean_bits(const report_log_t *log, int64_t begin, int64_t end)
{
    double sum = 0;

    for (int64_t i = begin; i < end; i++) {
        sum += log->loss[i];
    }
    return bits(sum / (double)(end - begin));
}

/* The mean of the last tenth of the steps. */
static double
last_bits(const report_log_t *log)
{
    const int64_t tenth = log->num_steps / 10;

    return mean_bits(log, log->num_steps - (tenth > 0 ? tenth : 1),
                     log->num_steps);
}

static double
largest_difference(const report_log_t *a, const report_log_t *b)
{
    double largest = 0;

    for (int64_t i = 0; i < a->num_steps; i++) {
        double difference = fabs(a->loss[i] - b->loss[i]);
        if (isnan(difference)) {
            return difference; /* which no limit allows */
        }
        largest = fmax(largest, difference);
    }
    return largest;
}

/* The line of the curve, from the top, that shows a value. */
static int
curve_line(double value, double top)
{
    int line = (int)lround((1 - value / top) * (CURVE_HEIGHT - 1));

    return line < 0 ? 0 : line >= CURVE_HEIGHT ? CURVE_HEIGHT - 1 : line;
}

/* The mean over the steps that a column of the curve stands for. */
static double
column_bits(const report_log_t *log, int column)
{
    int64_t begin = log->num_steps * column / CURVE_WIDTH;
    int64_t end = log->num_steps * (column + 1) / CURVE_WIDTH;

    return mean_bits(log, begin, end > begin ? end : begin + 1);
}

static void
draw(char curve[CURVE_HEIGHT][CURVE_WIDTH + 1], const report_log_t *log,
     double top, char mark, char mark_both)
{
    for (int x = 0; x < CURVE_WIDTH; x++) {
        double value = column_bits(log, x);
        if (isfinite(value)) {
            char *cell = &curve[curve_line(value, top)][x];
            *cell = *cell == ' ' || *cell == '-' ? mark : mark_both;
        }
    }
}

static void
show_curves(const report_log_t *a, const report_log_t *b)
{
    char curve[CURVE_HEIGHT][CURVE_WIDTH + 1];
    double top = ceil(fmax(column_bits(a, 0), a->unigram_bits));
    const int unigram_line = curve_line(a->unigram_bits, top);

    for (int y = 0; y < CURVE_HEIGHT; y++) {
        memset(curve[y], y == unigram_line ? '-' : ' ', CURVE_WIDTH);
        curve[y][CURVE_WIDTH] = '\0';
    }
    draw(curve, a, top, 'a', '*');
    draw(curve, b, top, 'b', '*');

    printf("Loss in bits per byte: a on %d rank%s, b on %d, * both;  "
           "--- unigram entropy\n\n",
           a->num_ranks, a->num_ranks == 1 ? "" : "s", b->num_ranks);
    for (int y = 0; y < CURVE_HEIGHT; y++) {
        printf("%5.1f |%s\n", top * (1 - (double)y / (CURVE_HEIGHT - 1)),
               curve[y]);
    }
    printf("      +");
    for (int x = 0; x < CURVE_WIDTH; x++) {
        putchar('-');
    }
    printf("\n       step 1%*lld\n\n", CURVE_WIDTH - 6,
           (long long)a->num_steps);
}

static void
show_losses(const report_log_t *a, const report_log_t *b)
{
    const report_log_t *logs[] = { a, b };

    for (int i = 0; i < 2; i++) {
        printf("  %c: %d rank%s  first %.4f  last tenth %.4f  (last step, in "
               "nats: %.9g)\n",
               "ab"[i], logs[i] -> num_ranks,
               logs[i] -> num_ranks == 1 ? ", " : "s,", bits(logs[i]->loss[0]),
               last_bits(logs[i]), logs[i]->loss[logs[i]->num_steps - 1]);
    }
    printf("  unigram entropy of the text: %.4f\n\n", a->unigram_bits);
}

static void
show_load(const report_log_t *log)
{
    int64_t most = 1;

    for (int32_t l = 0; l < log->num_layers; l++) {
        for (int32_t e = 0; e < log->num_experts; e++) {
            most = log->load[l][e] > most ? log->load[l][e] : most;
        }
    }
    printf("Tokens per expert, over the training\n\n  expert");
    for (int32_t l = 0; l < log->num_layers; l++) {
        printf("  layer %-*d", BAR_WIDTH + 2, l);
    }
    putchar('\n');
    for (int32_t e = 0; e < log->num_experts; e++) {
        printf("  %6d", e);
        for (int32_t l = 0; l < log->num_layers; l++) {
            int length = (int)(log->load[l][e] * BAR_WIDTH / most);
            printf("  ");
            for (int x = 0; x < BAR_WIDTH; x++) {
                putchar(x < length ? '#' : ' ');
            }
            printf(" %7lld", (long long)log->load[l][e]);
        }
        putchar('\n');
    }
    putchar('\n');
}

static double
total_seconds(const report_log_t *log)
{
    double total = 0;

    for (int32_t i = 0; i < log->num_stages; i++) {
        total += log->stages[i].seconds;
    }
    return total;
}

static void
show_times(const report_log_t *a, const report_log_t *b)
{
    const double total_a = total_seconds(a);
    const double total_b = total_seconds(b);

    printf("Time on rank 0, waiting for other ranks included\n\n"
           "  %-14s a: %d rank%-10s b: %d rank%s\n",
           "", a->num_ranks, a->num_ranks == 1 ? "" : "s", b->num_ranks,
           b->num_ranks == 1 ? "" : "s");
    for (int32_t i = 0; i < a->num_stages; i++) {
        printf("  %-14s %7.2f s %5.1f %%  %7.2f s %5.1f %%\n",
               a->stages[i].name, a->stages[i].seconds,
               100 * a->stages[i].seconds / total_a, b->stages[i].seconds,
               100 * b->stages[i].seconds / total_b);
    }
    printf("  %-14s %7.2f s          %7.2f s\n\n", "total", total_a, total_b);
}

/* Returns the exit status. */
static int
judge(const report_log_t *a, const report_log_t *b)
{
    const double difference = largest_difference(a, b);
    const double limit = ALLOWED_SHARE * a->unigram_bits;
    const int agree = difference <= ALLOWED_DIFFERENCE;
    const int learned = last_bits(a) < limit && last_bits(b) < limit;

    printf("%s  the runs' losses differ by at most %.3g nats (allowed: %.3g, "
           "for no sum is reordered)\n",
           agree ? "ok  " : "FAIL", difference, ALLOWED_DIFFERENCE);
    printf("%s  the last losses, %.3f and %.3f bits, are %s %.3f, %.1f of the "
           "unigram entropy\n",
           learned ? "ok  " : "FAIL", last_bits(a), last_bits(b),
           learned ? "below" : "not below", limit, ALLOWED_SHARE);
    return agree && learned ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* Two logs can be compared when they are of the same training. */
static int
comparable(const report_log_t *a, const report_log_t *b)
{
    if (a->num_steps != b->num_steps || a->unigram_bits != b->unigram_bits ||
        a->num_stages != b->num_stages) {
        fprintf(stderr,
                "moe_lm_report: the logs are of different trainings: %lld and "
                "%lld steps, unigram entropy %g and %g bits\n",
                (long long)a->num_steps, (long long)b->num_steps,
                a->unigram_bits, b->unigram_bits);
        return 0;
    }
    return 1;
}

int
main(int argc, char **argv)
{
    report_log_t a = { 0 };
    report_log_t b = { 0 };
    int result = EXIT_FAILURE;

    if (argc != 3) {
        fprintf(stderr, "usage: moe_lm_report LOG LOG\n");
        return EXIT_FAILURE;
    }
    if (report_log_read(argv[1], &a) == 0 &&
        report_log_read(argv[2], &b) == 0 && comparable(&a, &b)) {
        show_curves(&a, &b);
        show_losses(&a, &b);
        show_load(&a);
        show_times(&a, &b);
        result = judge(&a, &b);
    }
    report_log_free(&a);
    report_log_free(&b);
    return result;
}
