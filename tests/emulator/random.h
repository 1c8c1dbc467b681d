/* SPDX-License-Identifier: MIT */
/* Numbers that EPX_EMULATOR_SEED decides (xorshift64*). */
#ifndef EMULATOR_RANDOM_H
#define EMULATOR_RANDOM_H

#include <stdint.h>

namespace emulator
{

struct random {
    uint64_t state;

    uint64_t next()
    {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return state * UINT64_C(0x2545f4914f6cdd1d);
    }
    uint32_t below(uint32_t bound)
    {
        return (uint32_t)((next() >> 32) * bound >> 32);
    }
    bool one_in(uint32_t count)
    {
        return below(count) == 0;
    }
};

/* One of many, as different from the next one as from any. */
static inline random
random_of(uint64_t seed, uint64_t number)
{
    random made = { (seed + 1) * UINT64_C(0x9e3779b97f4a7c15) ^
                    (number + 1) * UINT64_C(0xd1342543de82ef95) };

    made.state += made.state == 0;
    made.next();
    made.next();
    return made;
}

} // namespace emulator

#endif
