/* SPDX-License-Identifier: MIT */
#include "bench_peer.h"

#include "bench_link.h"
#include "mpi_peer_file.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define PEER_NAME "epx-bench-mpi-peer"
/* For mpirun's --timeout: nothing here may hang. */
#define PEER_SECONDS "900"
#define MAX_ARGS     40

/* Beside this program where that was built, in libexec where it is installed.
 */
static bool
find_peer(char *path, size_t bytes)
{
    static const char *const places[] = { "", "/../libexec/epx" };
    char self[2048];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0) {
        return false;
    }
    self[length] = '\0';
    char *slash = strrchr(self, '/');
    if (slash) {
        *slash = '\0';
    }
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int wrote = snprintf(path, bytes, "%s%s/" PEER_NAME, self, places[i]);
        if (wrote > 0 && (size_t)wrote < bytes && !access(path, X_OK)) {
            return true;
        }
    }
    return false;
}

static bool
write_head(FILE *file, const struct bench_run *run)
{
    const struct bench_options *o = run->options;
    struct mpi_peer_file head = {
        .magic = MPI_PEER_MAGIC,
        .ranks = o->ranks,
        .topk = run->routing->topk,
        .experts = o->experts,
        .layout = (int32_t)o->layout,
        .elem_bytes = (int32_t)epx_dtype_size(o->dtype),
        .combine_bytes = (int32_t)epx_dtype_size(run->shape.combine_dtype),
        .num_scales = run->shape.given_scales,
        .iters = o->iters,
        .warmup = o->warmup,
        .hidden = o->hidden,
        .max_tokens = run->routing->max_tokens,
    };
    for (int32_t r = 0; r < o->ranks; r++) {
        head.tokens_before[r + 1] =
            head.tokens_before[r] + bench_routing_tokens(run->routing, r);
    }
    return fwrite(&head, sizeof head, 1, file) == 1;
}

/* All indices, then all weights. */
static bool
write_routing(FILE *file, const struct bench_run *run)
{
    const struct bench_routing *routing = run->routing;
    size_t most = (size_t)routing->max_tokens * (size_t)routing->topk;
    int64_t *idx = malloc(most * sizeof *idx);
    float *weights = malloc(most * sizeof *weights);
    bool good = idx && weights;
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t r = 0; good && r < run->options->ranks; r++) {
            size_t cells = (size_t)bench_routing_tokens(routing, r) *
                           (size_t)routing->topk;
            good = bench_routing_fill(routing, r, 0, idx, weights) &&
                   (pass ? fwrite(weights, sizeof *weights, cells, file)
                         : fwrite(idx, sizeof *idx, cells, file)) == cells;
        }
    }
    free(idx);
    free(weights);
    return good;
}

/* A new file in *path, which the caller removes. */
static bool
write_work(const struct bench_run *run, char *path, size_t path_bytes,
           struct bench_error *error)
{
    const char *folder = getenv("TMPDIR");
    snprintf(path, path_bytes, "%s/epx-bench-XXXXXX",
             folder && *folder ? folder : P_tmpdir);
    int fd = mkostemp(path, O_CLOEXEC);
    FILE *file = fd >= 0 ? fdopen(fd, "wb") : NULL;
    if (!file) {
        return bench_fail(error, "cannot make %s: %s", path, strerror(errno));
    }
    bool good = write_head(file, run) && write_routing(file, run);
    good = !fclose(file) && good;
    if (!good) {
        unlink(path);
        return bench_fail(error, "cannot write %s", path);
    }
    return true;
}

/* The words that start the peer, in room of their own. */
struct command {
    const char *args[MAX_ARGS];
    int count;
    char ranks[16];
    char first_host[64];
    char hosts[1024];
};

static void
add(struct command *command, const char *word)
{
    command->args[command->count++] = word;
}

static void
add_setting(struct command *command, const char *name, const char *value)
{
    add(command, "--mca");
    add(command, name);
    add(command, value);
}

/* Each host's network namespace, with its ranks. */
static bool
list_hosts(const struct bench_options *o, struct command *command)
{
    size_t used = 0;
    for (int32_t h = 0; h < o->hosts; h++) {
        char name[64];
        if (!bench_link_netns(o, h, name, sizeof name)) {
            return false;
        }
        int wrote =
            snprintf(command->hosts + used, sizeof command->hosts - used,
                     "%s%s:%d", h ? "," : "", name,
                     bench_link_first(o, h + 1) - bench_link_first(o, h));
        if (wrote < 0 || (size_t)wrote >= sizeof command->hosts - used) {
            return false;
        }
        used += (size_t)wrote;
    }
    return bench_link_netns(o, 0, command->first_host,
                            sizeof command->first_host);
}

/* The link between the hosts, and none beside it. */
static void
add_link(const struct bench_run *run, const char *peer, struct command *command)
{
    const struct bench_options *o = run->options;
    add_setting(command, "pml", "ob1");
    add_setting(command, "btl", o->netns ? "self,vader,tcp" : "self,tcp");
    add_setting(command, "btl_tcp_if_include", run->shared->device);
    if (o->netns) {
        add_setting(command, "oob_tcp_if_include", run->shared->device);
        add_setting(command, "plm_rsh_agent", peer);
        add(command, "--host");
        add(command, command->hosts);
    }
}

static bool
make_command(const struct bench_run *run, const char *peer, const char *work,
             struct command *command, struct bench_error *error)
{
    const struct bench_options *o = run->options;
    snprintf(command->ranks, sizeof command->ranks, "%d", o->ranks);
    if (o->netns) {
        if (!list_hosts(o, command)) {
            return bench_fail(error, "--netns is too long for it");
        }
        add(command, peer);
        add(command, command->first_host);
    }
    add(command, "mpirun");
    add(command, "-n");
    add(command, command->ranks);
    add(command, "--oversubscribe");
    add(command, "--timeout");
    add(command, PEER_SECONDS);
    add(command, "--bind-to");
    /* Several daemons on one machine would bind to the same cores. */
    add(command,
        o->bind && o->ranks <= o->cores && !o->netns ? "core" : "none");
    if (geteuid() == 0) {
        add(command, "--allow-run-as-root");
    }
    if (o->hosts > 1) {
        add_link(run, peer, command);
    }
    add(command, peer);
    add(command, work);
    return true;
}

/* Starts mpirun with its output on *fd_p. */
static bool
start(const struct bench_run *run, const char *peer, const char *work,
      pid_t *pid_p, int *fd_p, struct bench_error *error)
{
    struct command command = { .count = 0 };
    int ends[2];
    if (!make_command(run, peer, work, &command, error)) {
        return false;
    }
    if (pipe2(ends, O_CLOEXEC)) {
        return bench_fail(error, "cannot make a pipe: %s", strerror(errno));
    }
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 2);
    int code = posix_spawnp(pid_p, command.args[0], &actions, NULL,
                            (char *const *)(uintptr_t)command.args, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    if (code) {
        close(ends[0]);
        return bench_fail(error, "cannot start %s: %s", command.args[0],
                          strerror(code));
    }
    *fd_p = ends[0];
    return true;
}

/* Takes the results out of all that is printed; of the rest the first line
 * that says something is kept. */
static void
read_results(FILE *output, struct bench_peer *peer, struct bench_error *said)
{
    char *line = NULL;
    size_t room = 0;
    int found = 0;
    said->text[0] = '\0';
    while (getline(&line, &room, output) > 0) {
        char name[16];
        struct bench_times times;
        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, MPI_PEER_LINE, name, &times.min, &times.p50,
                   &times.p99) == 4) {
            *(strcmp(name, "combine") ? &peer->dispatch : &peer->combine) =
                times;
            found++;
        } else if (!said->text[0] && line[strspn(line, "- ")]) {
            bench_fail(said, "%s", line);
        }
    }
    free(line);
    peer->ran = found == 2;
}

bool
bench_peer_run(const struct bench_run *run, struct bench_peer *peer,
               struct bench_error *error)
{
    const struct bench_options *o = run->options;
    char path[4096];
    char work[4096];
    struct bench_error said;
    pid_t pid = 0;
    int fd = -1;
    int status = 0;
    *peer = (struct bench_peer){ 0 };
    if (o->device != EPX_DEVICE_CPU) {
        return bench_fail(error, "it has no --device cuda");
    }
    if (o->dtype == EPX_F16 || o->quantize || o->logfmt || o->send_only) {
        return bench_fail(error,
                          "it has no f16, --quantize, --logfmt or --send-only");
    }
    if (!find_peer(path, sizeof path)) {
        return bench_fail(error, PEER_NAME " was not built; that needs MPI's "
                                           "C compiler wrapper");
    }
    if (!write_work(run, work, sizeof work, error)) {
        return false;
    }
    bool good = start(run, path, work, &pid, &fd, error);
    FILE *output = good ? fdopen(fd, "r") : NULL;
    if (output) {
        read_results(output, peer, &said);
        fclose(output);
    }
    while (good && waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    unlink(work);
    peer->ran = peer->ran && status == 0;
    if (good && !peer->ran) {
        return bench_fail(error, "mpirun failed: %.400s",
                          output ? said.text : "no memory");
    }
    return good;
}
