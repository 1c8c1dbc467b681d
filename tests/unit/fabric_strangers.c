/* SPDX-License-Identifier: MIT */
/* Strangers at the socket of the shm fabric neither get a segment nor give one,
 * and disturb nobody. */
#include "fabric_pair.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { NOBODY = 65534 };

/* ---- strangers of our own user ---- */

/* Connects, says what `spoil` makes of the right greeting, and sees whether
 * anything comes back. */
static void
check_stranger(void (*spoil)(pair_hello_t *hello, size_t *bytes_p,
                             int *num_fds_p))
{
    pair_t *pair = pair_open();
    pair_hello_t hello = pair_right_hello(pair);
    size_t bytes = sizeof(hello);
    int num_fds = 1;
    int decoy = pair_make_decoy(pair, pair->bytes, PAIR_SEALS);
    int decoys[] = { decoy, decoy, decoy };
    int connection = pair_connect_to(pair, 0);
    int fds = count_descriptors();
    char answer[256];

    assert_true(connection >= 0);
    spoil(&hello, &bytes, &num_fds);
    if (bytes > 0) {
        pair_say(connection, &hello, bytes, decoys, num_fds);
    } else {
        (void)shutdown(connection, SHUT_RDWR);
    }
    pair_assert_joins(pair);
    assert_true(recv(connection, answer, sizeof(answer), 0) <= 0);
    /* the ranks have closed 2 listeners and 2 segments, and kept no decoy */
    assert_int_equal(count_descriptors(), fds - 4);
    (void)close(connection);
    (void)close(decoy);
    pair_close(pair);
}

static void
says_nothing(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)hello;
    (void)num_fds_p;
    *bytes_p = 0;
}

static void
is_short(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)hello;
    (void)num_fds_p;
    *bytes_p -= 1;
}

static void
has_no_token(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)bytes_p;
    (void)num_fds_p;
    memset(hello->token, 0, sizeof(hello->token));
}

static void
has_a_wrong_token(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)bytes_p;
    (void)num_fds_p;
    hello->token[3] ^= UINT64_C(1) << 63;
}

static void
is_of_another_job(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)bytes_p;
    (void)num_fds_p;
    hello->job_id[1]++;
}

static void
speaks_another_language(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)bytes_p;
    (void)num_fds_p;
    hello->magic++;
}

static void
has_no_rank(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)bytes_p;
    (void)num_fds_p;
    hello->rank = UINT32_MAX;
}

static void
has_the_token_of_another(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)bytes_p;
    (void)num_fds_p;
    hello->rank = 0;
}

static void
brings_no_descriptor(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    (void)hello;
    (void)bytes_p;
    *num_fds_p = 0;
}

static void
brings_many_descriptors(pair_hello_t *hello, size_t *bytes_p, int *num_fds_p)
{
    has_a_wrong_token(hello, bytes_p, num_fds_p);
    *num_fds_p = 3;
}

static void
strangers_change_nothing(void **state)
{
    (void)state;
    check_stranger(says_nothing);
    check_stranger(is_short);
    check_stranger(has_no_token);
    check_stranger(has_a_wrong_token);
    check_stranger(is_of_another_job);
    check_stranger(speaks_another_language);
    check_stranger(has_no_rank);
    check_stranger(has_the_token_of_another);
    check_stranger(brings_no_descriptor);
    check_stranger(brings_many_descriptors);
}

/* ---- strangers of another user ---- */

/* A process of user nobody, which has acted and stays until it is let go. */
typedef struct nobody {
    pid_t pid;
    int leash; /* it ends when this is closed, also by our own end */
} nobody_t;

static void
be_nobody(const pair_t *pair, void (*act)(const pair_t *pair), int ready,
          int leash)
{
    char byte;

    if (setresuid(NOBODY, NOBODY, NOBODY) == 0) {
        act(pair);
        if (write(ready, "", 1) == 1) {
            (void)!read(leash, &byte, 1);
        }
    }
    _exit(1);
}

static nobody_t
start_as_nobody(const pair_t *pair, void (*act)(const pair_t *pair))
{
    int ready[2], leash[2];
    nobody_t nobody;
    char byte;

    assert_int_equal(pipe(ready), 0);
    assert_int_equal(pipe(leash), 0);
    nobody.pid = fork();
    assert_true(nobody.pid >= 0);
    if (nobody.pid == 0) {
        (void)close(leash[1]);
        be_nobody(pair, act, ready[1], leash[0]);
    }
    (void)close(ready[1]);
    (void)close(leash[0]);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    (void)close(ready[0]);
    nobody.leash = leash[1];
    return nobody;
}

static void
let_go(nobody_t nobody)
{
    (void)close(nobody.leash);
    assert_int_equal(waitpid(nobody.pid, NULL, 0), nobody.pid);
}

static void
check_other_user(void (*act)(const pair_t *pair))
{
    pair_t *pair;
    nobody_t nobody;

    if (geteuid() != 0) {
        print_message("NOT TESTED: strangers of another user; only root can "
                      "become one\n");
        skip();
    }
    pair = pair_open();
    nobody = start_as_nobody(pair, act);
    pair_assert_joins(pair);
    let_go(nobody);
    pair_close(pair);
}

/* Even with what only the bootstrap told. */
static void
say_all_that_is_right(const pair_t *pair)
{
    pair_hello_t hello = pair_right_hello(pair);
    int decoy = pair_make_decoy(pair, pair->bytes, PAIR_SEALS);

    pair_say(pair_connect_to(pair, 0), &hello, sizeof(hello), &decoy, 1);
}

static void
connect_and_be_silent(const pair_t *pair)
{
    if (pair_connect_to(pair, 0) < 0) {
        _exit(1);
    }
}

/* Any user can see the socket, and fill its queue. */
static void
connect_until_full(const pair_t *pair)
{
    for (int i = 0; i < 200; i++) {
        (void)pair_connect_to(pair, 0);
    }
}

static void
other_users_are_turned_away(void **state)
{
    (void)state;
    check_other_user(say_all_that_is_right);
}

static void
other_users_are_not_waited_for(void **state)
{
    (void)state;
    check_other_user(connect_and_be_silent);
}

static void
other_users_cannot_block_the_socket(void **state)
{
    (void)state;
    check_other_user(connect_until_full);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(strangers_change_nothing),
        cmocka_unit_test(other_users_are_turned_away),
        cmocka_unit_test(other_users_are_not_waited_for),
        cmocka_unit_test(other_users_cannot_block_the_socket),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
