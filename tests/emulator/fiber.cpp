// SPDX-License-Identifier: MIT
// Begun by ucontext, since nothing else is portable; switched by setjmp and
// longjmp, which ask nothing of the kernel.  That is a jump "down the stack",
// which glibc's fortified longjmp refuses.
#undef _FORTIFY_SOURCE
#include "emulator/fiber.h"

#include <stdint.h>
#include <string.h>

namespace emulator
{

static constexpr uint64_t CANARY = 0x57ac4e4d0ffe4d5e;

void
fiber_make(fiber *made, char *stack, size_t bytes, void (*body)())
{
    memcpy(stack, &CANARY, sizeof(CANARY));
    made->stack = stack;
    made->begun = false;
    (void)getcontext(&made->start);
    made->start.uc_stack.ss_sp = stack;
    made->start.uc_stack.ss_size = bytes;
    made->start.uc_link = nullptr;
    makecontext(&made->start, body, 0);
}

void
fiber_switch(fiber *from, fiber *to)
{
    if (_setjmp(from->at) != 0) {
        return;
    }
    if (!to->begun) {
        to->begun = true;
        (void)setcontext(&to->start);
    }
    _longjmp(to->at, 1);
}

bool
fiber_fits(const fiber *looked_at)
{
    return memcmp(looked_at->stack, &CANARY, sizeof(CANARY)) == 0;
}

} // namespace emulator
