/* SPDX-License-Identifier: MIT */
/* The shm fabric: sealed segments that leave nothing behind, and segments that
 * are refused. */
#include "conformance/world.h"
#include "fabric_pair.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- descriptors ---- */

static bool
is_segment(int fd)
{
    char path[64], target[64] = "";

    (void)snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return readlink(path, target, sizeof(target) - 1) > 0 &&
           strncmp(target, "/memfd:epx-segment", 18) == 0;
}

/* Segments that this process has open; *last_p is one of them. */
static int
count_segments(int *last_p)
{
    int count = 0;

    for (int fd = 0; fd < 1024; fd++) {
        if (is_segment(fd)) {
            *last_p = fd;
            count++;
        }
    }
    return count;
}

/* Whether this process maps something that has a name others could open. */
static bool
maps_a_named_segment(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4096];
    bool found = false;

    assert_non_null(maps);
    while (fgets(line, sizeof(line), maps) != NULL) {
        found = found || strstr(line, "/dev/shm/") != NULL;
    }
    (void)fclose(maps);
    return found;
}

static void
segments_cannot_be_resized(void **state)
{
    pair_t *pair = pair_open();
    off_t sizes[] = { 0, 1, (off_t)pair->bytes - 1, (off_t)pair->bytes + 4096 };
    int fd = -1;

    (void)state;
    assert_int_equal(count_segments(&fd), PAIR_RANKS);
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        errno = 0;
        assert_int_equal(ftruncate(fd, sizes[i]), -1);
        assert_int_equal(errno, EPERM);
    }
    assert_int_equal(fcntl(fd, F_GET_SEALS) & PAIR_SEALS,
                     F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW);
    /* nor can a peer seal it against its owner's writes */
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), -1);
    assert_int_equal(errno, EPERM);
    assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
    pair_assert_joins(pair);
    pair_close(pair);
}

static void
nothing_is_left_behind(void **state)
{
    int fds = count_descriptors();
    pair_t *pair = pair_open();
    int fd;

    (void)state;
    assert_false(maps_a_named_segment());
    pair_assert_joins(pair);
    assert_int_equal(count_segments(&fd), 0);
    assert_int_equal(count_descriptors(), fds);
    assert_false(maps_a_named_segment());
    pair_close(pair);
    assert_int_equal(count_descriptors(), fds);
}

/* Also when it never came to connect. */
static void
half_made_groups_leave_nothing(void **state)
{
    int fds = count_descriptors();

    (void)state;
    pair_close(pair_open());
    assert_int_equal(count_descriptors(), fds);
}

/* ---- segments that are not right ---- */

static void
wrong_headers_are_refused(void **state)
{
    static const size_t fields[] = {
        offsetof(epx__segment_header_t, magic),
        offsetof(epx__segment_header_t, layout_version),
        offsetof(epx__segment_header_t, job_id),
        offsetof(epx__segment_header_t, job_id) + 8,
        offsetof(epx__segment_header_t, bytes),
        offsetof(epx__segment_header_t, rank),
        offsetof(epx__segment_header_t, num_ranks),
        offsetof(epx__segment_header_t, max_experts),
    };

    (void)state;
    for (size_t i = 0; i < sizeof(fields) / sizeof(*fields); i++) {
        pair_t *pair = pair_open();

        pair->ranks[1].peers[1].base[fields[i]] ^= 4;
        pair_start_connect(pair, 0, 30000);
        pair_start_connect(pair, 1, 30000);
        pair_end_connect(pair, 1);
        pair_assert_fails(pair, 0, EPX_ERR_PEER_DATA,
                          "the segment of rank 1 is not of this job");
        pair_close(pair);
    }
}

/* A rank that keeps the means to cut its segment off, or sends another. */
static void
check_segment(size_t extra_bytes, int seals)
{
    pair_t *pair = pair_open();
    pair_hello_t hello = pair_right_hello(pair);
    int decoy = pair_make_decoy(pair, pair->bytes + extra_bytes, seals);
    int connection = pair_connect_to(pair, 0);

    assert_true(connection >= 0);
    pair_say(connection, &hello, sizeof(hello), &decoy, 1);
    pair_start_connect(pair, 0, 30000);
    pair_assert_fails(pair, 0, EPX_ERR_PEER_DATA, "the segment of rank 1 has");
    (void)close(connection);
    (void)close(decoy);
    pair_close(pair);
}

static void
unsealed_segments_are_refused(void **state)
{
    (void)state;
    check_segment(0, 0);
    check_segment(0, F_SEAL_SHRINK);
    check_segment(0, F_SEAL_GROW | F_SEAL_SEAL);
    check_segment(4096, PAIR_SEALS);
}

/* An ordinary file has no seals at all. */
static void
files_are_refused(void **state)
{
    pair_t *pair = pair_open();
    pair_hello_t hello = pair_right_hello(pair);
    int connection = pair_connect_to(pair, 0);
    FILE *file = tmpfile();
    int fd;

    (void)state;
    assert_non_null(file);
    fd = fileno(file);
    assert_int_equal(ftruncate(fd, (off_t)pair->bytes), 0);
    pair_say(connection, &hello, sizeof(hello), &fd, 1);
    pair_start_connect(pair, 0, 30000);
    pair_assert_fails(pair, 0, EPX_ERR_PEER_DATA, "the segment of rank 1 has");
    (void)close(connection);
    (void)fclose(file);
    pair_close(pair);
}

static void
missing_ranks_are_named(void **state)
{
    pair_t *pair = pair_open();

    (void)state;
    pair_start_connect(pair, 0, 50);
    pair_assert_fails(pair, 0, EPX_ERR_TIMEOUT, "the heap of rank 1");
    pair_close(pair);
}

/* Rank 1 sends its segment, but takes nobody in. */
static void
full_queues_are_told(void **state)
{
    pair_t *pair = pair_open();
    pair_hello_t hello = pair_right_hello(pair);
    int decoy = pair_make_decoy(pair, pair->bytes, PAIR_SEALS);
    int connection = pair_connect_to(pair, 0);
    int fillers[200];

    (void)state;
    for (int i = 0; i < 200; i++) {
        fillers[i] = pair_connect_to(pair, 1);
    }
    assert_int_equal(fillers[199], -1);
    pair_say(connection, &hello, sizeof(hello), &decoy, 1);
    pair_start_connect(pair, 0, 50);
    pair_assert_fails(pair, 0, EPX_ERR_TIMEOUT, "its heap to rank 1");
    for (int i = 0; fillers[i] >= 0; i++) {
        (void)close(fillers[i]);
    }
    (void)close(connection);
    (void)close(decoy);
    pair_close(pair);
}

/* ---- whole groups ---- */

static void
run_ranks(world_fn *fn)
{
    char text[4096];

    if (!world_run(WORLD_SHM, PAIR_RANKS, true, 0, fn, NULL, NULL, text,
                   sizeof(text))) {
        print_error("%s", text);
        fail();
    }
}

static epx_status_t
create_group(const world_rank_t *self, epx_group_t **group_p)
{
    epx_group_config_t config = EPX_GROUP_CONFIG_INIT;

    config.bootstrap = self->bootstrap;
    config.heap_bytes = PAIR_HEAP;
    config.num_workers = 1;
    return epx_group_create(&config, group_p);
}

static void
group_without_segments(world_rank_t *self, void *context)
{
    int fds = count_descriptors();
    epx_group_t *group;
    int fd;

    (void)context;
    if (world_failed(self, create_group(self, &group), "epx_group_create")) {
        return;
    }
    /* Those by which it watches its peer; none of a segment. */
    if (count_descriptors() > fds + 2 || count_segments(&fd) != 0) {
        world_fail(self, "%d descriptors before, %d with a group", fds,
                   count_descriptors());
    }
    if (strcmp(group->reach.fabric->name, "shm") != 0) {
        world_fail(self, "the fabric is %s", group->reach.fabric->name);
    }
    (void)world_failed(self, epx_group_destroy(group), "epx_group_destroy");
}

static void
groups_keep_no_segment_open(void **state)
{
    (void)state;
    run_ranks(group_without_segments);
}

static void
group_across_namespaces(world_rank_t *self, void *context)
{
    epx_group_t *group;
    epx_status_t status;

    (void)context;
    if (self->rank == 1 && unshare(CLONE_NEWNET) != 0) {
        world_fail(self, "unshare: %s", strerror(errno));
        return;
    }
    status = create_group(self, &group);
    /* It takes them for two nodes, and the second has no network. */
    if (status == EPX_OK || strstr(epx_last_error(), "network") == NULL) {
        world_fail(self, "status %d: %s", (int)status, epx_last_error());
    }
}

/* The errno with which a process of its own may not have a network. */
static int
probe_unshare(void)
{
    pid_t child = fork();
    int status;

    assert_true(child >= 0);
    if (child == 0) {
        _exit(unshare(CLONE_NEWNET) == 0 ? 0 : errno);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void
network_namespaces_are_not_crossed(void **state)
{
    int error = probe_unshare();

    (void)state;
    if (error != 0) {
        print_message("NOT TESTED: network namespaces: unshare: %s\n",
                      strerror(error));
        skip();
    }
    run_ranks(group_across_namespaces);
}

int
main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(segments_cannot_be_resized),
        cmocka_unit_test(nothing_is_left_behind),
        cmocka_unit_test(half_made_groups_leave_nothing),
        cmocka_unit_test(wrong_headers_are_refused),
        cmocka_unit_test(unsealed_segments_are_refused),
        cmocka_unit_test(files_are_refused),
        cmocka_unit_test(missing_ranks_are_named),
        cmocka_unit_test(full_queues_are_told),
        cmocka_unit_test(groups_keep_no_segment_open),
        cmocka_unit_test(network_namespaces_are_not_crossed),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
