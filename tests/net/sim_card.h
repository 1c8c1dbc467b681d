/* SPDX-License-Identifier: MIT */
/*
 * The simulated network where emulated cards are, in programs that are built
 * with SIM_HAS_CARD: what is said to lie on a card does, and what is put there
 * is seen once it has been flushed.
 */
#ifndef EPX_TESTS_NET_SIM_CARD_H
#define EPX_TESTS_NET_SIM_CARD_H

#include <stdbool.h>
#include <stdint.h>

#ifdef SIM_HAS_CARD
/* From now on, or no longer; what has not been seen is forgotten. */
void sim_card_use(bool is_used);
/* Aborts unless memory lies where it is said to. */
void sim_card_check(const void *memory, bool is_on_card);
/* Whether the address is a card's: then what is put there is kept for later.
 * Aborts if it comes from a card, and would not go to where rows lie. */
bool sim_card_put(uint64_t address, const char *from, uint64_t bytes,
                  bool is_from_card);
#else
static inline void
sim_card_use(bool is_used)
{
    (void)is_used;
}

static inline void
sim_card_check(const void *memory, bool is_on_card)
{
    (void)memory;
    (void)is_on_card;
}

static inline bool
sim_card_put(uint64_t address, const char *from, uint64_t bytes,
             bool is_from_card)
{
    (void)address;
    (void)from;
    (void)bytes;
    (void)is_from_card;
    return false;
}
#endif

#endif
