// SPDX-License-Identifier: MIT
// The same program must be C++, too.
#include "main.c"
