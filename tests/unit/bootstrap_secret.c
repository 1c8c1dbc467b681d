/* SPDX-License-Identifier: MIT */
/* Where the job's secret may come from, and where it may not. */
#include "bootstrap_util.h"

#include "bootstrap/secret.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define HEX "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF"

static char home[64];

static int
make_home(void **state)
{
    (void)state;
    (void)snprintf(home, sizeof(home), P_tmpdir "/epx-secret-XXXXXX");
    assert_non_null(mkdtemp(home));
    assert_int_equal(setenv("HOME", home, 1), 0);
    assert_int_equal(unsetenv("EPX_SECRET"), 0);
    assert_int_equal(unsetenv("EPX_SECRET_FILE"), 0);
    return 0;
}

static int
remove_home(void **state)
{
    char command[128];

    (void)state;
    (void)snprintf(command, sizeof(command), "rm -rf '%s'", home);
    return system(command);
}

static void
path_in_home(char path[128], const char *name)
{
    (void)snprintf(path, 128, "%s/%s", home, name);
}

static void
write_file(const char *path, const char *text, mode_t mode)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    assert_int_equal(fchmod(fd, mode), 0);
    (void)close(fd);
}

static void
check_load(epx_status_t status, const char *part)
{
    unsigned char secret[EPX__SECRET_BYTES];
    outcome_t outcome;

    outcome_set(&outcome, epx__secret_load(secret));
    outcome_check(&outcome, status, part);
    /* No sentence gives away what was tried. */
    assert_null(strstr(outcome.error, "00112233"));
    if (status == EPX_OK) {
        for (size_t i = 0; i < sizeof(secret); i++) {
            assert_int_equal(secret[i], i % 16 * 0x11);
        }
    }
}

static void
test_variable(void **state)
{
    static const char *const bad[] = { "",
                                       "0",
                                       HEX "0",
                                       HEX HEX,
                                       HEX "\n",
                                       " " HEX,
                                       "0x112233445566778899aabbccddeeff0011223"
                                       "3445566778899aabbccddeeff",
                                       "g0112233445566778899aabbccddeeff0011223"
                                       "3445566778899aabbccddeeff",
                                       "\xff\xfe" };

    (void)state;
    assert_int_equal(setenv("EPX_SECRET", HEX, 1), 0);
    check_load(EPX_OK, "");
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        assert_int_equal(setenv("EPX_SECRET", bad[i], 1), 0);
        check_load(EPX_ERR_ENVIRONMENT, "it must be 64 hexadecimal digits");
    }
}

static void
test_file_modes(void **state)
{
    static const struct {
        mode_t mode;
        bool good;
    } cases[] = {
        { 0600, true },  { 0400, true },  { 0700, true },  { 0640, false },
        { 0604, false }, { 0620, false }, { 0602, false }, { 0666, false },
        { 0610, false }, { 0601, false },
    };
    char path[128];

    (void)state;
    path_in_home(path, "secret");
    assert_int_equal(setenv("EPX_SECRET_FILE", path, 1), 0);
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        (void)unlink(path);
        write_file(path, HEX "\n", cases[i].mode);
        check_load(cases[i].good ? EPX_OK : EPX_ERR_ENVIRONMENT,
                   cases[i].good ? "" : "chmod 600");
    }
}

static void
test_file_contents(void **state)
{
    static const char *const bad[] = { "",      "\n",       HEX "\n\n", HEX " ",
                                       HEX "0", "00112233", "zz" };
    char path[128];

    (void)state;
    path_in_home(path, "secret");
    assert_int_equal(setenv("EPX_SECRET_FILE", path, 1), 0);
    write_file(path, HEX, 0600);
    check_load(EPX_OK, "");
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        write_file(path, bad[i], 0600);
        check_load(EPX_ERR_ENVIRONMENT, "must hold one line of 64");
    }
}

static void
test_not_a_file(void **state)
{
    char path[128];

    (void)state;
    path_in_home(path, "nothing");
    assert_int_equal(setenv("EPX_SECRET_FILE", path, 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "there is no such file");
    assert_int_equal(setenv("EPX_SECRET_FILE", "", 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "EPX_SECRET_FILE is \"\"");
    assert_int_equal(setenv("EPX_SECRET_FILE", home, 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "is not a regular file");
    path_in_home(path, "fifo");
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(setenv("EPX_SECRET_FILE", path, 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "is not a regular file");
}

/* Only the superuser can make a file that belongs to somebody else. */
static void
test_other_owner(void **state)
{
    char path[128];

    (void)state;
    if (geteuid() != 0) {
        skip();
    }
    path_in_home(path, "secret");
    write_file(path, HEX, 0600);
    assert_int_equal(chown(path, 12345, 12345), 0);
    assert_int_equal(setenv("EPX_SECRET_FILE", path, 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "belongs to user 12345; it must belong to");
}

static void
load_one(void *arg, int index, outcome_t *outcome)
{
    unsigned char secret[EPX__SECRET_BYTES];
    const int *gate = arg;

    (void)index;
    /* All of them wait here until the last has started. */
    (void)close(gate[1]);
    assert_int_equal(read(gate[0], secret, 1), 0);
    outcome_set(outcome, epx__secret_load(secret));
    memcpy(&outcome->value, secret, sizeof(outcome->value));
}

/* The file is made once, whole and private, however many ranks want it at the
 * same time, and nothing else is left behind. */
static void
test_ranks_race_for_the_file(void **state)
{
    char path[128];
    char command[160];
    struct stat file;

    (void)state;
    for (int round = 0; round < 20; round++) {
        processes_t processes = { 0 };
        int gate[2];

        path_in_home(path, ".config");
        (void)snprintf(command, sizeof(command), "rm -rf '%s'", path);
        assert_int_equal(system(command), 0);
        assert_int_equal(pipe2(gate, O_CLOEXEC), 0);
        for (int i = 0; i < 8; i++) {
            process_start(&processes, load_one, gate);
        }
        (void)close(gate[1]);
        processes_wait(&processes);
        (void)close(gate[0]);
        for (int i = 0; i < 8; i++) {
            outcome_check(&processes.outcomes[i], EPX_OK, "");
            assert_int_equal(processes.outcomes[i].value,
                             processes.outcomes[0].value);
        }
        path_in_home(path, ".config/epx/secret");
        assert_int_equal(stat(path, &file), 0);
        assert_int_equal(file.st_mode & 07777, 0600);
        assert_int_equal(file.st_nlink, 1);
        assert_int_equal(file.st_size, 65);
        path_in_home(path, ".config/epx");
        assert_int_equal(stat(path, &file), 0);
        assert_int_equal(file.st_mode & 07777, 0700);
        (void)snprintf(command, sizeof(command),
                       "test \"$(ls -A '%s')\" = "
                       "secret",
                       path);
        assert_int_equal(system(command), 0);
    }
}

static void
test_unusable_home(void **state)
{
    char path[128];

    (void)state;
    assert_int_equal(setenv("HOME", "relative", 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "HOME is not an absolute path");
    assert_int_equal(setenv("HOME", "", 1), 0);
    check_load(EPX_ERR_ENVIRONMENT, "HOME is not an absolute path");
    assert_int_equal(setenv("HOME", "/nonexistent/home", 1), 0);
    check_load(EPX_ERR_SYSTEM, "EPX_SECRET or EPX_SECRET_FILE can give");
    /* What others can read is not used, and not overwritten either. */
    assert_int_equal(setenv("HOME", home, 1), 0);
    path_in_home(path, ".config");
    assert_int_equal(mkdir(path, 0755), 0);
    path_in_home(path, ".config/epx");
    assert_int_equal(mkdir(path, 0755), 0);
    path_in_home(path, ".config/epx/secret");
    write_file(path, HEX, 0644);
    check_load(EPX_ERR_ENVIRONMENT, "chmod 600");
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_variable, make_home, remove_home),
        cmocka_unit_test_setup_teardown(test_file_modes, make_home,
                                        remove_home),
        cmocka_unit_test_setup_teardown(test_file_contents, make_home,
                                        remove_home),
        cmocka_unit_test_setup_teardown(test_not_a_file, make_home,
                                        remove_home),
        cmocka_unit_test_setup_teardown(test_other_owner, make_home,
                                        remove_home),
        cmocka_unit_test_setup_teardown(test_ranks_race_for_the_file, make_home,
                                        remove_home),
        cmocka_unit_test_setup_teardown(test_unusable_home, make_home,
                                        remove_home),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
