/* SPDX-License-Identifier: MIT */
/* Whoever can reach rank 0's port may do there what he likes: the ranks join
 * all the same, and nobody else does. */
#include "bootstrap_util.h"

#include "bootstrap/net.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define NUM_RANKS 3

typedef struct scene {
    uint16_t port;
    int guard;
    int log;          /* rank 0's stderr */
    rlim_t max_files; /* of rank 0; 0: as they are */
    processes_t processes;
} scene_t;

static void
take_part(void *arg, int index, outcome_t *outcome)
{
    const scene_t *scene = arg;
    epx__identity_t identity = identity_make(index, NUM_RANKS);
    int descriptors = count_descriptors();
    uint64_t recv[NUM_RANKS] = { 0 };
    uint64_t send = 100 + (uint64_t)index;
    epx__star_t *star;
    epx_status_t status;

    if (index == 0) {
        assert_int_equal(setenv("EPX_LOG", "warn", 1), 0);
        assert_true(dup2(scene->log, STDERR_FILENO) >= 0);
        if (scene->max_files != 0) {
            const struct rlimit files = { scene->max_files, scene->max_files };

            assert_int_equal(setrlimit(RLIMIT_NOFILE, &files), 0);
        }
    }
    status = epx__rendezvous_open(&identity, "127.0.0.1", scene->port,
                                  in_ms(120000), &star);
    if (status == EPX_OK) {
        status =
            epx__star_allgather(star, &send, recv, sizeof(send), in_ms(60000));
        epx__star_destroy(star);
    }
    for (uint64_t rank = 0; rank < NUM_RANKS; rank++) {
        outcome->value += recv[rank] != 100 + rank;
    }
    outcome->value += descriptors != count_descriptors();
    outcome_set(outcome, status);
}

static int
stranger_connect(const scene_t *scene)
{
    epx__address_t addresses[EPX__MAX_ADDRESSES];
    epx__reason_t why;
    int fd = -1;

    assert_int_equal(
        epx__resolve("127.0.0.1", scene->port, in_ms(5000), addresses, &why),
        1);
    for (int i = 0; fd < 0 && i < 200; i++) {
        fd = epx__net_connect(&addresses[0], in_ms(5000), &why);
        if (fd < 0) {
            sleep_ms(50); /* rank 0 may not have started yet */
        }
    }
    if (fd < 0) {
        fail_msg("%s", why.text);
    }
    return fd;
}

static void
say(int fd, const void *bytes, size_t count)
{
    /* Rank 0 may have hung up before the end. */
    (void)send(fd, bytes, count, MSG_NOSIGNAL);
}

/* Reads until rank 0 hangs up; returns the number of bytes that came. */
static size_t
listen_to_the_end(int fd, unsigned char *bytes, size_t size)
{
    struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
    size_t have = 0;

    for (;;) {
        epx__io_t io = epx__io_read(fd, bytes, size, &have);

        if (io != EPX__IO_AGAIN) {
            assert_int_equal(io, EPX__IO_CLOSED);
            return have;
        }
        assert_int_equal(poll(&poll_fd, 1, 60000), 1);
    }
}

static void
scene_open_limited(scene_t *scene, rlim_t max_files)
{
    memset(scene, 0, sizeof(*scene));
    scene->max_files = max_files;
    scene->guard = port_reserve("127.0.0.1", &scene->port);
    scene->log = memfd_create("log", MFD_CLOEXEC);
    assert_true(scene->log >= 0);
    process_start(&scene->processes, take_part, scene);
}

static void
scene_open(scene_t *scene)
{
    scene_open_limited(scene, 0);
}

/* The other ranks come, and all is well. */
static void
scene_close(scene_t *scene)
{
    for (int rank = 1; rank < NUM_RANKS; rank++) {
        process_start(&scene->processes, take_part, scene);
    }
    processes_wait(&scene->processes);
    for (int rank = 0; rank < NUM_RANKS; rank++) {
        outcome_check(&scene->processes.outcomes[rank], EPX_OK, "");
        assert_int_equal(scene->processes.outcomes[rank].value, 0);
    }
    (void)close(scene->guard);
    (void)close(scene->log);
}

static void
test_garbage(void **state)
{
    static const char *const openings[] = {
        "",
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "EPXR\2\0\1\0",
        "EPXR\2\0\3\0",
        "EPXF\1\0\1\0",
        "EPXR\3\0\1\0",
    };
    static const size_t lengths[] = { 0, 27, 8, 8, 8, 8 };
    unsigned char bytes[4096];
    unsigned char answer[256];
    scene_t scene;

    (void)state;
    srand(1);
    scene_open(&scene);
    for (int i = 0; i < 60; i++) {
        int kind = i % 6;
        int fd = stranger_connect(&scene);
        size_t said;

        for (size_t at = 0; at < sizeof(bytes); at++) {
            bytes[at] = (unsigned char)rand();
        }
        memcpy(bytes, openings[kind], lengths[kind]);
        say(fd, bytes, sizeof(bytes));
        said = listen_to_the_end(fd, answer, sizeof(answer));
        /* A hello gets a challenge, another version gets our version; nobody
         * gets more. */
        if (said != 0 && !(kind == 2 && said == EPX__CHALLENGE_BYTES) &&
            !(kind == 5 && said == EPX__PREFIX_BYTES)) {
            fail_msg("kind %d was told %zu bytes", kind, said);
        }
        (void)close(fd);
    }
    scene_close(&scene);
}

static void
test_halves_and_silence(void **state)
{
    unsigned char hello[EPX__HELLO_BYTES] = { 0 };
    unsigned char answer[256];
    int fds[16];
    scene_t scene;

    (void)state;
    epx__prefix_encode(hello, EPX__HELLO);
    scene_open(&scene);
    for (int i = 0; i < 16; i++) {
        fds[i] = stranger_connect(&scene);
        say(fds[i], hello, (size_t)i * 5);
        if (i % 4 == 3) {
            (void)close(fds[i]);
        }
    }
    /* Rank 0 hangs up by itself. */
    for (int i = 0; i < 16; i++) {
        if (i % 4 != 3) {
            assert_int_equal(listen_to_the_end(fds[i], answer, sizeof(answer)),
                             0);
            (void)close(fds[i]);
        }
    }
    scene_close(&scene);
}

/* Sends a hello a byte at a time, slower than rank 0's patience. */
static void
dribble(void *arg, int index, outcome_t *outcome)
{
    unsigned char hello[EPX__HELLO_BYTES] = { 0 };
    unsigned char answer[256];
    int fd = stranger_connect(arg);

    (void)index;
    epx__prefix_encode(hello, EPX__HELLO);
    for (size_t i = 0; i < sizeof(hello); i++) {
        say(fd, hello + i, 1);
        sleep_ms(100);
    }
    outcome->value = listen_to_the_end(fd, answer, sizeof(answer));
    (void)close(fd);
}

static void
test_a_byte_at_a_time(void **state)
{
    processes_t strangers = { 0 };
    scene_t scene;

    (void)state;
    scene_open(&scene);
    for (int i = 0; i < 4; i++) {
        process_start(&strangers, dribble, &scene);
    }
    for (int i = 0; i < 4; i++) {
        assert_int_equal(process_wait(&strangers, i)->value, 0);
    }
    scene_close(&scene);
}

static void
test_1000_silent_connections(void **state)
{
    int fds[1000];
    int count = 1000;
    struct rlimit files;
    scene_t scene;

    (void)state;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &files), 0);
    if (files.rlim_cur < 1100) {
        count = (int)files.rlim_cur - 100;
    }
    scene_open(&scene);
    for (int i = 0; i < count; i++) {
        fds[i] = stranger_connect(&scene);
    }
    scene_close(&scene);
    for (int i = 0; i < count; i++) {
        (void)close(fds[i]);
    }
}

/* Strangers take every descriptor that rank 0 may have. */
static void
test_few_descriptors(void **state)
{
    int fds[60];
    scene_t scene;

    (void)state;
    scene_open_limited(&scene, 24);
    for (int i = 0; i < 60; i++) {
        fds[i] = stranger_connect(&scene);
    }
    scene_close(&scene);
    for (int i = 0; i < 60; i++) {
        (void)close(fds[i]);
    }
}

/* Connects again and again, and holds on to the last few, until killed. */
static void
besiege(void *arg, int index, outcome_t *outcome)
{
    int fds[40];
    int i = 0;

    (void)index;
    (void)outcome;
    memset(fds, -1, sizeof(fds));
    for (;;) {
        (void)close(fds[i]);
        fds[i] = stranger_connect(arg);
        i = (i + 1) % 40;
    }
}

static void
test_siege(void **state)
{
    processes_t strangers = { 0 };
    scene_t scene;

    (void)state;
    scene_open(&scene);
    process_start(&strangers, besiege, &scene);
    process_start(&strangers, besiege, &scene);
    sleep_ms(500);
    for (int rank = 1; rank < NUM_RANKS; rank++) {
        process_start(&scene.processes, take_part, &scene);
    }
    for (int rank = 0; rank < NUM_RANKS; rank++) {
        outcome_check(process_wait(&scene.processes, rank), EPX_OK, "");
    }
    process_kill(&strangers, 0);
    process_kill(&strangers, 1);
    (void)close(scene.guard);
    (void)close(scene.log);
}

/* Runs the handshake of a rank as far as it goes; notes what it said. */
static epx__handshake_state_t
pretend(const scene_t *scene, const epx__identity_t *identity,
        unsigned char *said, size_t *said_bytes_p)
{
    unsigned char nonce[EPX__NONCE_BYTES] = { 9 };
    epx__outbox_t out = { 0 };
    epx__handshake_t shake;
    int fd = stranger_connect(scene);
    struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
    epx__io_t io = EPX__IO_AGAIN;

    *said_bytes_p = 0;
    epx__handshake_connect(&shake, identity, nonce, &out);
    while (io != EPX__IO_CLOSED && epx__handshake_want(&shake) > 0) {
        size_t have = 0;

        if (!epx__outbox_empty(&out)) {
            memcpy(said + *said_bytes_p, out.small, out.small_bytes);
            *said_bytes_p += out.small_bytes;
            assert_int_equal(epx__outbox_flush(&out, fd), EPX__IO_DONE);
        }
        assert_int_equal(poll(&poll_fd, 1, 60000), 1);
        io = epx__io_read(fd, shake.in + shake.in_bytes,
                          epx__handshake_want(&shake), &have);
        epx__handshake_got(&shake, have, &out);
    }
    (void)close(fd);
    return shake.state;
}

static void
test_replay(void **state)
{
    epx__identity_t identity = identity_make(1, NUM_RANKS);
    unsigned char said[EPX__HELLO_BYTES + EPX__PROOF_MSG_BYTES];
    unsigned char answer[256];
    size_t said_bytes;
    scene_t scene;

    (void)state;
    scene_open(&scene);
    /* Rank 1 joins, is overheard, and goes away again. */
    assert_int_equal(pretend(&scene, &identity, said, &said_bytes),
                     EPX__HANDSHAKE_JUDGED);
    assert_int_equal(said_bytes, sizeof(said));
    for (int i = 0; i < 5; i++) {
        int fd = stranger_connect(&scene);

        say(fd, said, sizeof(said));
        assert_int_equal(listen_to_the_end(fd, answer, sizeof(answer)),
                         EPX__CHALLENGE_BYTES);
        (void)close(fd);
    }
    scene_close(&scene);
}

static void
test_wrong_proof_is_logged_once(void **state)
{
    unsigned char hello[EPX__HELLO_BYTES + EPX__PROOF_MSG_BYTES] = { 0 };
    unsigned char answer[256];
    char log[4096];
    const char *line;
    ssize_t length;
    scene_t scene;
    int log_copy;

    (void)state;
    epx__prefix_encode(hello, EPX__HELLO);
    epx__prefix_encode(hello + EPX__HELLO_BYTES, EPX__PROOF);
    scene_open(&scene);
    log_copy = dup(scene.log);
    for (int i = 0; i < 5; i++) {
        int fd = stranger_connect(&scene);

        say(fd, hello, sizeof(hello));
        assert_int_equal(listen_to_the_end(fd, answer, sizeof(answer)),
                         EPX__CHALLENGE_BYTES);
        (void)close(fd);
    }
    scene_close(&scene);
    length = pread(log_copy, log, sizeof(log) - 1, 0);
    assert_true(length >= 0);
    log[length] = '\0';
    (void)close(log_copy);
    line = strstr(log, "127.0.0.1 does not hold the job's secret");
    if (line == NULL || strstr(line + 1, "turned away") != NULL) {
        fail_msg("not one line but: \"%s\"", log);
    }
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_garbage),
        cmocka_unit_test(test_halves_and_silence),
        cmocka_unit_test(test_a_byte_at_a_time),
        cmocka_unit_test(test_1000_silent_connections),
        cmocka_unit_test(test_few_descriptors),
        cmocka_unit_test(test_siege),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_wrong_proof_is_logged_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
