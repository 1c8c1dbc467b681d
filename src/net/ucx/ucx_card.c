/* SPDX-License-Identifier: MIT */
/* Whether UCX can be let at the memory of a card, GPUDirect RDMA. */
#include "net/ucx/ucx_backend.h"

#include <stdlib.h>
#include <string.h>

#define ON_CARD (UINT64_C(1) << UCS_MEMORY_TYPE_CUDA)

/* UCT_MD_FLAG_REG_DMABUF, which UCX 1.13 has not: the adapter registers what
 * the driver exports. */
#define BY_DMABUF (UINT64_C(1) << 10)

/* Before, puts take any memory for the host's: openucx/ucx issue 9533. */
#define OLDEST_MINOR 16

/* Whether an adapter registers the memory of cards, so that it reads and writes
 * it itself. */
static bool
registers(const epx__ucx_library_t *ucx, const epx__net_config_t *config,
          uct_component_h component, const char *adapter)
{
    uct_md_config_t *settings = NULL;
    uct_md_attr_t attributes = { 0 };
    uct_md_h domain = NULL;
    ucs_status_t status =
        ucx->uct_md_config_read(component, NULL, NULL, &settings);

    if (status == UCS_OK) {
        status = ucx->uct_md_open(component, adapter, settings, &domain);
        ucx->uct_config_release(settings);
    }
    if (status != UCS_OK) {
        return false;
    }
    status = ucx->uct_md_query(domain, &attributes);
    ucx->uct_md_close(domain);
    return status == UCS_OK && ((attributes.cap.reg_mem_types & ON_CARD) != 0 ||
                                (config->card_net.exports_dmabuf &&
                                 (attributes.cap.flags & BY_DMABUF) != 0));
}

/* Count a component's adapters that the config names, and those of them that
 * register. */
static void
count_adapters(const epx__ucx_library_t *ucx, const epx__net_config_t *config,
               uct_component_h component, int *named_p, int *good_p)
{
    uct_component_attr_t about = {
        .field_mask = UCT_COMPONENT_ATTR_FIELD_NAME |
                      UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT,
    };
    uct_md_resource_desc_t *adapters;

    if (ucx->uct_component_query(component, &about) != UCS_OK ||
        strcmp(about.name, "ib") != 0) {
        return;
    }
    adapters = calloc(about.md_resource_count + 1, sizeof(*adapters));
    about.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCES;
    about.md_resources = adapters;
    if (adapters != NULL &&
        ucx->uct_component_query(component, &about) == UCS_OK) {
        for (unsigned i = 0; i < about.md_resource_count; i++) {
            const char *adapter = adapters[i].md_name;

            if (epx__ucx_names(config, adapter)) {
                *named_p += 1;
                *good_p += registers(ucx, config, component, adapter);
            }
        }
    }
    free(adapters);
}

static bool
all_register(const epx__ucx_library_t *ucx, const epx__net_config_t *config)
{
    uct_component_h *components;
    unsigned count;
    int named = 0, good = 0;

    if (ucx->uct_query_components(&components, &count) != UCS_OK) {
        return false;
    }
    for (unsigned i = 0; i < count; i++) {
        count_adapters(ucx, config, components[i], &named, &good);
    }
    ucx->uct_release_component_list(components);
    return named > 0 && good == named;
}

bool
epx__ucx_reaches_card(void *state, const epx__net_config_t *config,
                      bool is_short, const char **why_p)
{
    const ucx_t *ucx = state;
    ucp_context_attr_t known = { .field_mask = UCP_ATTR_FIELD_MEMORY_TYPES };
    unsigned major, minor, release;

    ucx->library->ucp_get_version(&major, &minor, &release);
    if (minor < OLDEST_MINOR) {
        *why_p = "it takes UCX 1.16 or a later 1.x";
        return false;
    }
    if (ucx->library->ucp_context_query(ucx->context, &known) != UCS_OK ||
        (known.memory_types & ON_CARD) == 0) {
        *why_p = "UCX has to be one that is built with CUDA, and its "
                 "transports to include cuda_copy";
        return false;
    }
    if (is_short && !all_register(ucx->library, config)) {
        *why_p = "the adapter does not register the memory of cards";
        return false;
    }
    return true;
}
