/* SPDX-License-Identifier: MIT */
#include "net/ucx/ucx_settings.h"

#include "core/env.h"
#include "net/net_internal.h"
#include "net/ucx/ucx_backend.h"

#include <stdio.h>
#include <string.h>

/* Over TCP UCX copies what it sends and what it receives through a segment, and
 * the system does so once more: pieces that fill one are long enough, and still
 * in a core's cache for the next copy.  Longer messages would come in several
 * segments, after a rendezvous that saves no copy. */
#define TCP_PIECE_BYTES ((uint64_t)256 << 10)

/* Connecting must not block the thread; a segment holds a piece and all
 * headers. */
static const epx__net_setting_t defaults[] = {
    { "TCP_CONN_NB", "y" },
    { "TCP_TX_SEG_SIZE", "260k" },
    { "TCP_RX_SEG_SIZE", "260k" },
    { "KEEPALIVE_INTERVAL", "10s" },
};

/* Before 1.17 a transport's own settings go by the rest of their names alone.
 */
static const char *
name_for(const epx__ucx_library_t *ucx, const char *name)
{
    static const char *const transports[] = { "TCP_",      "RC_VERBS_",
                                              "RC_MLX5_",  "DC_MLX5_",
                                              "UD_VERBS_", "UD_MLX5_" };
    unsigned major, minor, release;

    ucx->ucp_get_version(&major, &minor, &release);
    for (size_t i = 0; minor < 17 && i < sizeof(transports) / sizeof(char *);
         i++) {
        size_t length = strlen(transports[i]);

        if (strncmp(name, transports[i], length) == 0) {
            return name + length;
        }
    }
    return name;
}

static epx_status_t
set(const epx__ucx_library_t *ucx, ucp_config_t *settings, const char *name,
    const char *value)
{
    ucs_status_t status =
        ucx->ucp_config_modify(settings, name_for(ucx, name), value);

    return status == UCS_OK
               ? EPX_OK
               : epx__fail(EPX_ERR_INVALID, "UCX does not take %.60s=%.60s: %s",
                           name, value, ucx->ucs_status_string(status));
}

/* Unless the user did. */
static epx_status_t
set_default(const epx__ucx_library_t *ucx, ucp_config_t *settings,
            const char *name, const char *value)
{
    char variable[96];

    (void)snprintf(variable, sizeof(variable), "UCX_%s", name);
    return epx__env_string(variable) != NULL ? EPX_OK
                                             : set(ucx, settings, name, value);
}

/* Where UCX is to be, by config, then environment, then default. */
typedef struct place {
    char name[64];      /* of the interface, where none is named */
    const char *device; /* or a list of them; NULL: there is none */
    const char *transports;
    bool has_interfaces;  /* some entry of the list may be one, */
    bool only_interfaces; /* all of them are */
} place_t;

/* The next entry of a list with commas; false: there are no more. */
static bool
next_entry(const char **at_p, const char **entry_p, size_t *length_p)
{
    const char *at = *at_p;

    *entry_p = at;
    *length_p = strcspn(at, ",");
    *at_p = at + *length_p + (at[*length_p] == ',');
    return *at != '\0';
}

static void
look_at_devices(place_t *place)
{
    const char *at = place->device;
    const char *named;
    size_t length;

    /* What is not excluded may be an interface. */
    place->has_interfaces = *at == '^';
    place->only_interfaces = *at != '^';
    while (next_entry(&at, &named, &length)) {
        struct sockaddr_storage address;
        char entry[64], name[64];
        bool is_interface;

        (void)snprintf(entry, sizeof(entry), "%.*s", (int)length, named);
        is_interface = epx__net_interface(entry, name, sizeof(name), &address);
        place->only_interfaces = place->only_interfaces && is_interface;
        place->has_interfaces =
            place->has_interfaces || is_interface || strcmp(entry, "all") == 0;
    }
}

static void
find_place(const epx__net_config_t *config, place_t *place)
{
    struct sockaddr_storage address;

    *place =
        (place_t){ .device = config->device, .transports = config->transports };
    if (place->device == NULL) {
        place->device = epx__env_string("UCX_NET_DEVICES");
    }
    if (place->device == NULL &&
        epx__net_interface(NULL, place->name, sizeof(place->name), &address)) {
        place->device = place->name;
    }
    if (place->device != NULL) {
        look_at_devices(place);
    }
    if (place->transports == NULL) {
        place->transports = epx__env_string("UCX_TLS");
    }
    if (place->transports == NULL) {
        place->transports = place->only_interfaces ? "tcp" : "all";
    }
}

/* One device, so that UCX listens nowhere else. */
static epx_status_t
set_device(const epx__ucx_library_t *ucx, const epx__net_config_t *config,
           ucp_config_t *settings)
{
    place_t place;
    epx_status_t status;

    find_place(config, &place);
    if (place.device == NULL) {
        return epx__fail(EPX_ERR_SYSTEM,
                         "no network interface is up; loopback is used only "
                         "when it is named");
    }
    status = set(ucx, settings, "NET_DEVICES", place.device);
    if (status == EPX_OK) {
        status = set(ucx, settings, "TLS", place.transports);
    }
    /* When a peer dies in the midst of a send that is not copied, UCX 1.13 ends
     * it twice, which its assertions take for a reason to abort. */
    return status == EPX_OK && (place.only_interfaces ||
                                strcmp(place.transports, "tcp") == 0)
               ? set_default(ucx, settings, "ZCOPY_THRESH", "inf")
               : status;
}

epx_status_t
epx__ucx_settings(const epx__ucx_library_t *ucx,
                  const epx__net_config_t *config, ucp_config_t **settings_p)
{
    ucp_config_t *settings;
    ucs_status_t read = ucx->ucp_config_read(NULL, NULL, &settings);
    const epx__net_setting_t *given = config->settings;
    epx_status_t status;

    if (read != UCS_OK) {
        return epx__fail(EPX_ERR_ENVIRONMENT,
                         "UCX cannot read its environment variables: %s",
                         ucx->ucs_status_string(read));
    }
    status = set_device(ucx, config, settings);
    for (size_t i = 0;
         i < sizeof(defaults) / sizeof(defaults[0]) && status == EPX_OK; i++) {
        status =
            set_default(ucx, settings, defaults[i].name, defaults[i].value);
    }
    while (given != NULL && given->name != NULL && status == EPX_OK) {
        status = set(ucx, settings, given->name, given->value);
        given++;
    }
    if (status != EPX_OK) {
        ucx->ucp_config_release(settings);
        return status;
    }
    *settings_p = settings;
    return EPX_OK;
}

/* Whether an entry is that name, or that and more behind a separator. */
static bool
is_named(const char *entry, size_t length, const char *name, char separator)
{
    size_t own = strlen(name);

    return length >= own && strncmp(entry, name, own) == 0 &&
           (length == own || entry[own] == separator);
}

/* Whether a list of transports names one that does puts by itself: whoever
 * takes all on a device of InfiniBand or RoCE gets one. */
static bool
names_rdma(const char *transports)
{
    static const char *const names[] = { "all", "ib", "rc", "dc" };
    const char *at = transports;
    const char *named;
    size_t length;

    while (*transports != '^' && next_entry(&at, &named, &length)) {
        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
            if (is_named(named, length, names[i], '_')) {
                return true;
            }
        }
    }
    return false;
}

bool
epx__ucx_has_native_puts(const epx__net_config_t *config)
{
    place_t place;

    find_place(config, &place);
    return place.device != NULL && !place.has_interfaces &&
           names_rdma(place.transports);
}

bool
epx__ucx_names(const epx__net_config_t *config, const char *adapter)
{
    bool is_listed = false, is_excluding;
    const char *at, *named;
    size_t length;
    place_t place;

    find_place(config, &place);
    if (place.device == NULL) {
        return false;
    }
    is_excluding = *place.device == '^';
    at = place.device + is_excluding;
    while (next_entry(&at, &named, &length)) {
        /* With a port, or without. */
        is_listed = is_listed || is_named(named, length, "all", ',') ||
                    is_named(named, length, adapter, ':');
    }
    return is_listed != is_excluding;
}

uint64_t
epx__ucx_piece_bytes(const epx__net_config_t *config)
{
    place_t place;

    find_place(config, &place);
    return strcmp(place.transports, "tcp") == 0 ? TCP_PIECE_BYTES
                                                : EPX__NET_PIECE_BYTES;
}
