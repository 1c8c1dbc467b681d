/* SPDX-License-Identifier: MIT */
/* Threads that take turns on one OS thread, and say themselves when. */
#ifndef EMULATOR_FIBER_H
#define EMULATOR_FIBER_H

#include <setjmp.h>
#include <stddef.h>
#include <ucontext.h>

namespace emulator
{

struct fiber {
    jmp_buf at;       /* where it goes on */
    ucontext_t start; /* where it begins, once */
    bool begun = true;
    char *stack = nullptr;
};

/* A fiber that will run body(), which must not return, on `stack`. */
void fiber_make(fiber *made, char *stack, size_t bytes, void (*body)());

/* From the running one to another; returns when somebody comes back. */
void fiber_switch(fiber *from, fiber *to);

/* Whether it has never used the last bytes of its stack. */
bool fiber_fits(const fiber *looked_at);

} // namespace emulator

#endif
