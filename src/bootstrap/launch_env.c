/* SPDX-License-Identifier: MIT */
#include "bootstrap/launch_env.h"

#include "core/env.h"
#include "core/status.h"

#include <sodium.h>
#include <stdio.h>
#include <string.h>

/* The variables read here, and those read elsewhere. */
static const char *const known_names[] = {
    "EPX_LOG",    "EPX_SECRET",      "EPX_SECRET_FILE", "EPX_PORT",
    "EPX_JOB_ID", "EPX_CUDA_FABRIC", "EPX_CUDA_COPY",
};

#define FIRST_DERIVED_PORT 20000
#define NUM_DERIVED_PORTS  10000

typedef struct env {
    epx__getenv_t get;
    void *context;
} env_t;

/* Who may have started this process, in the order in which they are asked: the
 * innermost launcher first, since the outer one's variables are still there. */
typedef struct launcher {
    const char *rank_name;
    const char *size_name;
    const char *other_size_name; /* used where size_name is unset; or NULL */
    /* Variables that are `size` (ranks_here) or 1 (nodes) when all ranks are on
     * this host; NULL where the launcher has none. */
    const char *ranks_here_name;
    const char *nodes_name;
    const char *other_nodes_name;
} launcher_t;

static const launcher_t launchers[] = {
    { .rank_name = "RANK", .size_name = "WORLD_SIZE" },
    { .rank_name = "OMPI_COMM_WORLD_RANK",
      .size_name = "OMPI_COMM_WORLD_SIZE",
      .ranks_here_name = "OMPI_COMM_WORLD_LOCAL_SIZE" },
    { .rank_name = "PMIX_RANK",
      .size_name = "PMIX_SIZE",
      .other_size_name = "SLURM_NTASKS",
      .nodes_name = "SLURM_NNODES",
      .other_nodes_name = "SLURM_JOB_NUM_NODES" },
    { .rank_name = "SLURM_PROCID",
      .size_name = "SLURM_NTASKS",
      .nodes_name = "SLURM_NNODES",
      .other_nodes_name = "SLURM_JOB_NUM_NODES" },
};

static const char *
get(const env_t *env, const char *name)
{
    return name == NULL ? NULL : env->get(env->context, name);
}

/* An unset variable gives *found_p = false and leaves *value_p alone. */
static epx_status_t
get_uint(const env_t *env, const char *name, uint64_t min, uint64_t max,
         uint64_t *value_p, bool *found_p)
{
    const char *text = get(env, name);

    *found_p = text != NULL;
    return text == NULL ? EPX_OK
                        : epx__parse_uint(name, text, min, max, value_p);
}

static epx_status_t
parse_rank(const launcher_t *launcher, const char *rank_text,
           const char *size_name, const char *size_text, epx__launch_t *launch)
{
    uint64_t rank;
    uint64_t num_ranks;
    epx_status_t status =
        epx__parse_uint(size_name, size_text, 1, EPX_MAX_RANKS, &num_ranks);

    if (status == EPX_OK) {
        status = epx__parse_uint(launcher->rank_name, rank_text, 0,
                                 EPX_MAX_RANKS - 1, &rank);
    }
    if (status != EPX_OK) {
        return status;
    }
    if (rank >= num_ranks) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "%s is %s; it must be below %s, which is %s",
                         launcher->rank_name, rank_text, size_name, size_text);
    }
    launch->rank = (int32_t)rank;
    launch->num_ranks = (int32_t)num_ranks;
    return EPX_OK;
}

/* Finds who has started this process: *launcher_p. */
static epx_status_t
find_rank(const env_t *env, epx__launch_t *launch,
          const launcher_t **launcher_p)
{
    for (size_t i = 0; i < sizeof(launchers) / sizeof(*launchers); i++) {
        const launcher_t *launcher = &launchers[i];
        const char *rank_text = get(env, launcher->rank_name);
        const char *size_name = launcher->size_name;
        const char *size_text = get(env, size_name);
        const char *other = launcher->other_size_name;

        if (rank_text == NULL && size_text == NULL) {
            continue;
        }
        if (rank_text == NULL) {
            return epx__fail(EPX_ERR_ENVIRONMENT, "%s is set but %s is not",
                             size_name, launcher->rank_name);
        }
        if (size_text == NULL && get(env, other) != NULL) {
            size_name = other;
            size_text = get(env, other);
        }
        if (size_text == NULL) {
            return epx__fail(EPX_ERR_ENVIRONMENT, "%s is set but %s%s%s is not",
                             launcher->rank_name, size_name,
                             other != NULL ? " or " : "",
                             other != NULL ? other : "");
        }
        *launcher_p = launcher;
        return parse_rank(launcher, rank_text, size_name, size_text, launch);
    }
    return epx__fail(
        EPX_ERR_ENVIRONMENT,
        "no launcher has said which rank this is: none of RANK and WORLD_SIZE "
        "(torchrun, epx-run), OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE "
        "(mpirun), PMIX_RANK and PMIX_SIZE (PMIx), SLURM_PROCID and "
        "SLURM_NTASKS (srun) is set");
}

/* Adds name=value to the hash if the variable is set. */
static epx_status_t
hash_variable(const env_t *env, const char *name,
              crypto_hash_sha256_state *hash, bool *found_p)
{
    const char *value = get(env, name);

    *found_p = value != NULL;
    if (value == NULL) {
        return EPX_OK;
    }
    if (value[0] == '\0') {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "%s is empty; unset it, or let it name the job", name);
    }
    /* With their NULs, so that no two pairs give the same bytes. */
    crypto_hash_sha256_update(hash, (const void *)name, strlen(name) + 1);
    crypto_hash_sha256_update(hash, (const void *)value, strlen(value) + 1);
    return EPX_OK;
}

/* The user's own name for the job comes before its launcher's. */
static epx_status_t
hash_job(const env_t *env, epx__launch_t *launch, bool *found_p)
{
    static const char *const names[] = { "EPX_JOB_ID", "TORCHELASTIC_RUN_ID",
                                         "PMIX_NAMESPACE", "SLURM_JOB_ID" };
    crypto_hash_sha256_state hash;
    epx_status_t status;
    bool step_found;

    *found_p = false;
    crypto_hash_sha256_init(&hash);
    for (size_t i = 0; !*found_p && i < sizeof(names) / sizeof(*names); i++) {
        status = hash_variable(env, names[i], &hash, found_p);
        if (status == EPX_OK && *found_p &&
            strcmp(names[i], "SLURM_JOB_ID") == 0) {
            status = hash_variable(env, "SLURM_STEP_ID", &hash, &step_found);
        }
        if (status != EPX_OK) {
            return status;
        }
    }
    crypto_hash_sha256_final(&hash, launch->job);
    return EPX_OK;
}

static epx_status_t
all_ranks_here(const env_t *env, const launcher_t *launcher,
               const epx__launch_t *launch, bool *here_p)
{
    uint64_t count = 0;
    bool found;
    epx_status_t status = get_uint(env, launcher->ranks_here_name, 1,
                                   EPX_MAX_RANKS, &count, &found);

    *here_p = found && count == (uint64_t)launch->num_ranks;
    if (status == EPX_OK && !found) {
        status =
            get_uint(env, launcher->nodes_name, 1, UINT32_MAX, &count, &found);
        if (status == EPX_OK && !found) {
            status = get_uint(env, launcher->other_nodes_name, 1, UINT32_MAX,
                              &count, &found);
        }
        *here_p = found && count == 1;
    }
    return status;
}

static epx_status_t
check_host(const char *name, const char *text)
{
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyz"
                                  "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                  "0123456789.-_:%";
    size_t length = strlen(text);

    if (length == 0 || length >= EPX__MAX_HOST_BYTES ||
        strspn(text, allowed) != length) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "%s is \"%.60s\"; it must be the address or name of "
                         "rank 0's host, of 1 to %d letters, digits and .-_:%%",
                         name, text, EPX__MAX_HOST_BYTES - 1);
    }
    return EPX_OK;
}

/* With all ranks on this host no address is needed, and the job's id gives a
 * port that jobs seldom share. */
static epx_status_t
choose_local(const env_t *env, const launcher_t *launcher, bool job_found,
             bool port_found, epx__launch_t *launch)
{
    bool here;
    epx_status_t status = all_ranks_here(env, launcher, launch, &here);

    if (status != EPX_OK) {
        return status;
    }
    if (!here) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "%s does not tell where rank 0 is; set MASTER_ADDR "
                         "and MASTER_PORT",
                         launcher->rank_name);
    }
    if (!port_found && !job_found) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "no job id gives rank 0 a port; set EPX_JOB_ID, "
                         "EPX_PORT, or MASTER_ADDR and MASTER_PORT");
    }
    (void)snprintf(launch->host, sizeof(launch->host), "127.0.0.1");
    if (!port_found) {
        launch->port =
            (uint16_t)(FIRST_DERIVED_PORT +
                       epx__get_le(launch->job, 4) % NUM_DERIVED_PORTS);
    }
    return EPX_OK;
}

static epx_status_t
find_rank_0(const env_t *env, const launcher_t *launcher, bool job_found,
            epx__launch_t *launch)
{
    const char *host = get(env, "MASTER_ADDR");
    uint64_t port = 0;
    uint64_t master_port = 0;
    bool port_found;
    bool master_port_found;
    epx_status_t status =
        get_uint(env, "EPX_PORT", 1, UINT16_MAX, &port, &port_found);

    if (status == EPX_OK) {
        /* MASTER_PORT + 1 must be a port too, where it is used. */
        status = get_uint(env, "MASTER_PORT", 1,
                          port_found ? UINT16_MAX : UINT16_MAX - 1,
                          &master_port, &master_port_found);
    }
    if (status == EPX_OK && host != NULL) {
        status = check_host("MASTER_ADDR", host);
    }
    if (status != EPX_OK || launch->num_ranks == 1) {
        return status;
    }
    launch->port = (uint16_t)(port_found ? port : master_port + 1);
    if (host == NULL && master_port_found) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "MASTER_PORT is set but MASTER_ADDR is not");
    }
    if (host == NULL) {
        return choose_local(env, launcher, job_found, port_found, launch);
    }
    if (!port_found && !master_port_found) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "MASTER_ADDR is set but neither MASTER_PORT nor "
                         "EPX_PORT is");
    }
    (void)snprintf(launch->host, sizeof(launch->host), "%s", host);
    return EPX_OK;
}

epx_status_t
epx__launch_parse(epx__getenv_t get_variable, void *context,
                  epx__launch_t *launch)
{
    const env_t env = { .get = get_variable, .context = context };
    const launcher_t *launcher = NULL;
    bool job_found;
    epx_status_t status;

    *launch = (epx__launch_t){ 0 };
    status = find_rank(&env, launch, &launcher);
    if (status != EPX_OK) {
        return status;
    }
    status = hash_job(&env, launch, &job_found);
    if (status != EPX_OK) {
        return status;
    }
    return find_rank_0(&env, launcher, job_found, launch);
}

size_t
epx__launch_warn_unknown(char *const *environment)
{
    size_t num_unknown = 0;

    for (; environment != NULL && *environment != NULL; environment++) {
        size_t length = strcspn(*environment, "=");
        bool known = strncmp(*environment, "EPX_", 4) != 0;

        for (size_t i = 0; i < sizeof(known_names) / sizeof(*known_names);
             i++) {
            known |= strlen(known_names[i]) == length &&
                     strncmp(known_names[i], *environment, length) == 0;
        }
        if (!known) {
            num_unknown++;
            /* Not its value: it may be a secret whose name has a typing error.
             */
            epx__log(EPX__LOG_WARN,
                     "the environment variable %.*s means nothing to EPX",
                     (int)(length < 80 ? length : 80), *environment);
        }
    }
    return num_unknown;
}
