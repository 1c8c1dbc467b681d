/* SPDX-License-Identifier: MIT */
/* The fabrics over the memory of cards; part of the CUDA module. */
#ifndef EPX_FABRIC_CUDA_CUDA_FABRIC_H
#define EPX_FABRIC_CUDA_CUDA_FABRIC_H

#include "fabric/fabric.h"

/* In order of preference; NULL-terminated. */
extern const epx__fabric_ops_t *const epx__cuda_fabrics[];

/* How the card's memory can be shared, as bits EPX__MEMORY_*; only the kind
 * that EPX_CUDA_FABRIC asks for when that is set. */
epx_status_t epx__cuda_memory_kinds(int32_t ordinal, uint32_t *kinds_p);

/* The names of the fabrics for which a card offers what they need; NULL ends
 * them. */
void epx__cuda_fabric_names(uint32_t kinds, const char *names[8]);

/* Fill in the card's part of a place: which card, its SMs, the workers that
 * the group asked for and the kinds of memory.  Checks the ordinal. */
epx_status_t epx__cuda_place(const epx_group_config_t *config,
                             epx__fabric_place_t *place);

/* ---- what the fabrics share ---- */

/* Prepare this rank's new segment, which is zero-filled where peers expect it,
 * and the card's common part.  mapped_bytes is what peers have to map. */
epx_status_t epx__cuda_segment_init(const epx_group_t *group, char *base,
                                    uint64_t bytes, uint64_t mapped_bytes,
                                    epx__fabric_card_t *card);

/* Refuse a peer's segment, mapped at reach->peers[rank], that is not what it
 * should have shared. */
epx_status_t epx__cuda_segment_check(const epx_group_t *group,
                                     const epx__reach_t *reach, int32_t rank,
                                     const epx__fabric_card_t *card);

/* EPX_ERR_UNSUPPORTED when the driver says that this rank's card cannot reach
 * the memory of rank's; EPX_OK also when this process does not see that one. */
epx_status_t epx__cuda_check_reach(const epx_group_t *group, int32_t rank,
                                   const epx__fabric_card_t *cards);

/* Why two ranks cannot share memory of one kind; NULL when they can. */
const char *epx__cuda_kind_obstacle(const epx__fabric_place_t *a,
                                    const epx__fabric_place_t *b,
                                    uint32_t kind);

extern const epx__fabric_ops_t epx__fabric_cuda_thread;
extern const epx__fabric_ops_t epx__fabric_cuda_vmm;
extern const epx__fabric_ops_t epx__fabric_cuda_ipc;
extern const epx__fabric_ops_t epx__fabric_cuda_handle;

#endif
