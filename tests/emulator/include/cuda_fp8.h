/* SPDX-License-Identifier: MIT */
/* Nothing: what is no GPU rounds to FP8 by engine/common/numeric.h. */
