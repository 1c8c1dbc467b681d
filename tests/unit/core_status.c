/* SPDX-License-Identifier: MIT */
/* A failure's sentence, its way between threads, and the log. */
#include "api_common.h"
#include "core/status.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- the last error ---- */

static void
fail_returns_its_status_and_sentence(void **state)
{
    (void)state;
    assert_int_equal(epx__fail(EPX_ERR_SHAPE, "H is %d", 7), EPX_ERR_SHAPE);
    assert_string_equal(epx_last_error(), "H is 7");
    assert_int_equal(epx__fail(EPX_ERR_NULL, "%s", "another"), EPX_ERR_NULL);
    assert_string_equal(epx_last_error(), "another");
    epx__error_clear();
    assert_string_equal(epx_last_error(), "");
}

static void
errno_can_be_told_and_stays(void **state)
{
    char text[128];

    (void)state;
    for (int number = 1; number < 40; number++) {
        (void)snprintf(text, sizeof(text), "call: %s", strerror(number));
        errno = number;
        (void)epx__fail(EPX_ERR_SYSTEM, "call: %m");
        assert_int_equal(errno, number);
        assert_string_equal(epx_last_error(), text);
    }
}

static void
long_sentences_are_cut(void **state)
{
    char word[2000];
    epx__error_t error;

    (void)state;
    memset(word, 'w', sizeof(word));
    word[sizeof(word) - 1] = '\0';
    assert_int_equal(epx__fail(EPX_ERR_STATE, "%s", word), EPX_ERR_STATE);
    assert_int_equal(strlen(epx_last_error()), sizeof(error.text) - 1);
    assert_memory_equal(epx_last_error(), word, sizeof(error.text) - 1);
    epx__error_save(&error, EPX_ERR_STATE);
    assert_string_equal(error.text, epx_last_error());
}

/* Fails on its own and hands the error over. */
static void *
fail_here(void *arg)
{
    epx__error_t *error = arg;

    if (epx_last_error()[0] == '\0') { /* the main thread's is not ours */
        epx__error_save(error, epx__fail(EPX_ERR_TIMEOUT, "from a thread"));
    }
    return NULL;
}

static void
each_thread_has_its_own(void **state)
{
    epx__error_t error = { EPX_OK, "" };
    pthread_t thread;

    (void)state;
    (void)epx__fail(EPX_ERR_SHAPE, "from main");
    assert_int_equal(pthread_create(&thread, NULL, fail_here, &error), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_string_equal(epx_last_error(), "from main");
    assert_int_equal(error.status, EPX_ERR_TIMEOUT);
    assert_int_equal(epx__error_restore(&error), EPX_ERR_TIMEOUT);
    assert_string_equal(epx_last_error(), "from a thread");
}

static void
every_status_has_a_meaning(void **state)
{
    (void)state;
#define CHECK(name, value, text)   \
    assert_int_equal(name, value); \
    assert_string_equal(epx_status_string(name), text);
    EPX_STATUS_MAP(CHECK)
#undef CHECK
    assert_string_equal(epx_status_string((epx_status_t)1), "unknown status");
    assert_string_equal(epx_status_string((epx_status_t)-1000),
                        "unknown status");
}

/* ---- the log: read once per process, so in a process of its own ---- */

/* What this program does when it is run with an argument. */
static int
log_something(const char *what)
{
    if (strcmp(what, "fail") == 0) {
        (void)epx__fail(EPX_ERR_SHAPE, "sentence %d", 1);
    } else if (strcmp(what, "long") == 0) {
        epx__log(EPX__LOG_WARN, "%01000d", 1);
    } else if (strcmp(what, "check") == 0) {
        if (epx__log_check() != EPX_OK) {
            (void)fprintf(stderr, "epx[0] %s\n", epx_last_error());
        }
    } else {
        epx__log(EPX__LOG_WARN, "a warning");
        epx__log(EPX__LOG_INFO, "a detail");
    }
    return 0;
}

/* Runs this program; what it writes to stderr comes back in text. */
static void
run_with_log(const char *level, const char *what, char *text, size_t bytes)
{
    int ends[2];
    size_t used = 0;
    ssize_t n;
    pid_t child;
    int status;

    assert_int_equal(pipe(ends), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        int set =
            level == NULL ? unsetenv("EPX_LOG") : setenv("EPX_LOG", level, 1);

        if (set == 0 && dup2(ends[1], STDERR_FILENO) >= 0) {
            (void)execl("/proc/self/exe", "core_status", what, NULL);
        }
        _exit(1);
    }
    (void)close(ends[1]);
    while ((n = read(ends[0], text + used, bytes - 1 - used)) > 0) {
        used += (size_t)n;
    }
    text[used] = '\0';
    (void)close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

/* Whether the log has just the lines that it should have. */
static void
check_log(const char *level, const char *what, const char *const *wanted)
{
    char text[4096];
    const char *at = text;

    run_with_log(level, what, text, sizeof(text));
    for (; *wanted != NULL; wanted++) {
        const char *end = strchr(at, '\n');

        if (end == NULL || strncmp(at, "epx[", 4) != 0 ||
            strstr(at, *wanted) == NULL || strstr(at, *wanted) > end) {
            fail_msg("EPX_LOG=%s, %s: expected a line with '%s', got '%s'",
                     level == NULL ? "(unset)" : level, what, *wanted, at);
        }
        at = end + 1;
    }
    assert_string_equal(at, "");
}

#define LINES(...) ((const char *const[]){ __VA_ARGS__, NULL })
#define NOTHING    ((const char *const[]){ NULL })

static void
silent_unless_asked(void **state)
{
    (void)state;
    check_log(NULL, "fail", NOTHING);
    check_log(NULL, "warn", NOTHING);
    check_log("none", "fail", NOTHING);
    check_log("none", "warn", NOTHING);
}

static void
failures_are_logged(void **state)
{
    (void)state;
    check_log("error", "fail", LINES("error: sentence 1"));
    check_log("info", "fail", LINES("error: sentence 1"));
}

/* Also when nothing has failed before. */
static void
levels_include_those_before(void **state)
{
    (void)state;
    check_log("error", "warn", NOTHING);
    check_log("warn", "warn", LINES("warn: a warning"));
    check_log("info", "warn", LINES("warn: a warning", "info: a detail"));
}

static void
unknown_levels_are_refused(void **state)
{
    (void)state;
    check_log("warn", "check", NOTHING);
    check_log("verbose", "check",
              LINES("EPX_LOG is \"verbose\"; allowed are none, error, warn and "
                    "info"));
    check_log("", "check", LINES("EPX_LOG is \"empty\""));
}

static void
long_lines_end_in_one(void **state)
{
    (void)state;
    check_log("warn", "long", LINES("0000000000"));
}

int
main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fail_returns_its_status_and_sentence),
        cmocka_unit_test(errno_can_be_told_and_stays),
        cmocka_unit_test(long_sentences_are_cut),
        cmocka_unit_test(each_thread_has_its_own),
        cmocka_unit_test(every_status_has_a_meaning),
        cmocka_unit_test(silent_unless_asked),
        cmocka_unit_test(failures_are_logged),
        cmocka_unit_test(levels_include_those_before),
        cmocka_unit_test(unknown_levels_are_refused),
        cmocka_unit_test(long_lines_end_in_one),
    };

    if (argc > 1) {
        return log_something(argv[1]);
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
