/* SPDX-License-Identifier: MIT */
/* For a network that writes to emulated cards. */
#ifndef EMULATOR_FLUSH_H
#define EMULATOR_FLUSH_H

#ifdef __cplusplus
extern "C"
#endif
    /* What makes visible what it has written, when a program asks a card to;
     * NULL: it is at once. */
    void
    emulator_on_flush(void (*flush)(void));

#endif
