/* SPDX-License-Identifier: MIT */
#include "bench_ucx_library.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

bool
bench_ucx_load(struct bench_ucx_library *library, struct bench_error *error)
{
    /* EPX has loaded it already, and it stays. */
    void *handle = dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL);
    const char *missing = NULL;
    if (!handle) {
        return bench_fail(error, "cannot load UCX: %.400s", dlerror());
    }
#define FIND(name)                                     \
    do {                                               \
        void *found = dlsym(handle, #name);            \
        memcpy(&library->name, &found, sizeof(found)); \
        missing = found == NULL ? #name : missing;     \
    } while (0);
    BENCH_UCX_FUNCTIONS(FIND)
#undef FIND
    return !missing || bench_fail(error, "UCX has no %s", missing);
}

static bool
set(const struct bench_ucx_library *library, ucp_config_t *config,
    const char *name, const char *value, struct bench_error *error)
{
    char variable[64];
    unsigned major, minor, release;
    snprintf(variable, sizeof variable, "UCX_%s", name);
    if (getenv(variable)) {
        return true;
    }
    library->ucp_get_version(&major, &minor, &release);
    if (minor < 17 && !strncmp(name, "TCP_", 4)) {
        name += 4; /* as it was called before */
    }
    ucs_status_t status = library->ucp_config_modify(config, name, value);
    return status == UCS_OK ||
           bench_fail(error, "UCX does not take %s=%s: %s", name, value,
                      library->ucs_status_string(status));
}

bool
bench_ucx_context(const struct bench_ucx_library *library, const char *device,
                  ucp_context_h *context_p, struct bench_error *error)
{
    const ucp_params_t params = { .field_mask = UCP_PARAM_FIELD_FEATURES,
                                  .features =
                                      UCP_FEATURE_AM | UCP_FEATURE_RMA };
    ucp_config_t *config = NULL;
    ucs_status_t status = library->ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) {
        return bench_fail(error, "UCX cannot read its environment: %s",
                          library->ucs_status_string(status));
    }
    /* A device with a port, as mlx5_0:1, is no interface. */
    bool good =
        set(library, config, "NET_DEVICES", device, error) &&
        (strchr(device, ':') || set(library, config, "TLS", "tcp", error)) &&
        set(library, config, "TCP_CONN_NB", "y", error) &&
        set(library, config, "TCP_TX_SEG_SIZE", "260k", error) &&
        set(library, config, "TCP_RX_SEG_SIZE", "260k", error);
    if (good) {
        status = library->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR,
                                           &params, config, context_p);
        good = status == UCS_OK ||
               bench_fail(error, "UCX cannot use %s: %s", device,
                          library->ucs_status_string(status));
    }
    library->ucp_config_release(config);
    return good;
}
