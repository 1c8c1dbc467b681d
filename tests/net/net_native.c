/* SPDX-License-Identifier: MIT */
/* On which devices UCX is taken to do puts by itself, and which adapters they
 * are. */
#include "net/net_backend.h"
#ifdef EPX_TEST_UCX
#include "net/ucx/ucx_backend.h"
#endif
#include "world.h"

#include <stdlib.h>

typedef struct choice {
    const char *device, *transports; /* of the config */
    const char *env_devices, *env_transports;
    bool is_native;
} choice_t;

static const choice_t choices[] = {
    { NULL, NULL, NULL, NULL, false },
    { "lo", NULL, NULL, NULL, false },
    { "lo,lo", NULL, NULL, NULL, false },
    { "all", NULL, NULL, NULL, false },
    { "^lo", NULL, NULL, NULL, false },
    { "mlx5_0:1", NULL, NULL, NULL, true },
    { "mlx5_0:1,mlx5_1:1", NULL, NULL, NULL, true },
    { "mlx5_0:1,lo", NULL, NULL, NULL, false },
    { "lo,mlx5_0:1", NULL, NULL, NULL, false },
    { "mlx5_0:1,all", NULL, NULL, NULL, false },
    { "mlx5_0:1", "tcp", NULL, NULL, false },
    { "mlx5_0:1", "tcp,rc_x", NULL, NULL, true },
    { "mlx5_0:1", "^tcp", NULL, NULL, false },
    { "mlx5_0:1", NULL, NULL, "tcp", false },
    { "mlx5_0:1", "rc", NULL, "tcp", true },
    { NULL, NULL, "all", NULL, false },
    { NULL, NULL, "lo", NULL, false },
    { NULL, NULL, "mlx5_0:1", NULL, true },
    { "lo", NULL, "mlx5_0:1", NULL, false },
};

static const char *
shown(const char *text)
{
    return text != NULL ? text : "(none)";
}

static void
set(const char *name, const char *value)
{
    CHECK((value != NULL ? setenv(name, value, 1) : unsetenv(name)) == 0, "%m");
}

#ifdef EPX_TEST_UCX
typedef struct naming {
    const char *device, *adapter;
    bool is_named;
} naming_t;

static const naming_t namings[] = {
    { "mlx5_0:1", "mlx5_0", true },   { "mlx5_0", "mlx5_0", true },
    { "mlx5_0:1", "mlx5_1", false },  { "mlx5_10:1", "mlx5_1", false },
    { "mlx5_1:1", "mlx5_10", false }, { "mlx5_0:1,mlx5_1:1", "mlx5_1", true },
    { "all", "mlx5_1", true },        { "^mlx5_0:1", "mlx5_1", true },
    { "^mlx5_0:1", "mlx5_0", false }, { "lo", "mlx5_0", false },
};

static void
check_names(void)
{
    for (size_t i = 0; i < sizeof(namings) / sizeof(namings[0]); i++) {
        const naming_t *naming = &namings[i];
        const epx__net_config_t config = { .device = naming->device };

        CHECK(epx__ucx_names(&config, naming->adapter) == naming->is_named,
              "device %s, adapter %s: not %d", naming->device, naming->adapter,
              naming->is_named);
    }
}
#endif

int
main(void)
{
    if (epx__net_ucx.puts == NULL) {
        return 77; /* built without UCX */
    }
#ifdef EPX_TEST_UCX
    check_names();
#endif
    for (size_t i = 0; i < sizeof(choices) / sizeof(choices[0]); i++) {
        const choice_t *choice = &choices[i];
        const epx__net_config_t config = { .device = choice->device,
                                           .transports = choice->transports };

        set("UCX_NET_DEVICES", choice->env_devices);
        set("UCX_TLS", choice->env_transports);
        CHECK(
            epx__net_ucx.puts->are_native(&config) == choice->is_native,
            "device %s, transports %s, UCX_NET_DEVICES %s, UCX_TLS %s: not %d",
            shown(choice->device), shown(choice->transports),
            shown(choice->env_devices), shown(choice->env_transports),
            choice->is_native);
    }
    return 0;
}
