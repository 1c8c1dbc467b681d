/* SPDX-License-Identifier: MIT */
/* The one device that there is, and what its parts share. */
#ifndef EMULATOR_DEVICE_H
#define EMULATOR_DEVICE_H

#include "emulator/stream.h"

namespace emulator
{

/* Few SMs, as there are few cores; each has room for one block of EPX's. */
constexpr int DEVICE_SMS = 32;
constexpr unsigned DEVICE_THREADS = 1024; /* of a block */
constexpr size_t DEVICE_SHARED = 227 << 10;
constexpr size_t DEVICE_MEMORY = (size_t)8 << 30;
constexpr int DEVICE_MAJOR = 9;

/* Something for a stream to do, after all that it was given before. */
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

/* Memory that pointers are looked up in. */
void memory_note(void *base, size_t bytes, cudaMemoryType type);
bool memory_forget(void *base);

/* A function of the driver by its name; null if it is not emulated. */
void *driver_function(const char *name);

} // namespace emulator

#endif
