/* SPDX-License-Identifier: MIT */
/* The cards of this machine, and working on one of them. */
#ifndef EPX_FABRIC_CUDA_CUDA_DEVICE_H
#define EPX_FABRIC_CUDA_CUDA_DEVICE_H

#include <epx/epx.h>

#define EPX__CUDA_MAX_CARDS 64

/*
 * Make the card's primary context the calling thread's, until it leaves: every
 * entry point that calls CUDA does this, and leaves the program's own context
 * as it was.  The context is pushed, since cudaSetDevice could not put back a
 * card that the program has not used without making a context there.  Nests.
 */
epx_status_t epx__cuda_device_enter(int32_t ordinal);
void epx__cuda_device_leave(void);

/* EPX_OK when the card can be used; *count_p (may be NULL) is how many there
 * are.  EPX_ERR_UNSUPPORTED tells what is missing: driver, card, ordinal. */
epx_status_t epx__cuda_device_check(int32_t ordinal, int32_t *count_p);

/* Its PCI id, for people: "0000:3b:00.0". */
void epx__cuda_pci(int32_t ordinal, char text[16]);

/* The engine's device_info: of a card and what reaches its memory. */
epx_status_t epx__cuda_device_info(int32_t ordinal, epx_device_info_t *info);

#endif
