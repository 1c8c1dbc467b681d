/* SPDX-License-Identifier: MIT */
/* The devices that there are, EPX_EMULATOR_CARDS (1), and what their parts
 * share. */
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
/* Where it was made; the current one for the default stream. */
int device_of(cudaStream_t stream);

int num_devices();
/* Of the calling thread. */
int current_device();
void set_current_device(int device);

/* Memory that pointers are looked up in. */
void memory_note(void *base, size_t bytes, cudaMemoryType type, int device);
bool memory_forget(void *base);
/* Let a device reach what begins there; false if it may already, which a driver
 * was seen to refuse. */
bool memory_allow(void *base, int device);
/* Whether it may reach an address, which can be the host's. */
bool memory_reaches(const void *ptr, int device);

/* A function of the driver by its name; null if it is not emulated. */
void *driver_function(const char *name);

} // namespace emulator

#endif
