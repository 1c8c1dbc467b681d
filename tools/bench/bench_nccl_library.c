/* SPDX-License-Identifier: MIT */
#include "bench_nccl_library.h"

#include <dlfcn.h>
#include <string.h>

bool
bench_nccl_load(struct bench_nccl_library *library, struct bench_error *error)
{
    void *handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    const char *missing = NULL;
    if (!handle) {
        return bench_fail(error, "cannot load NCCL: %.400s", dlerror());
    }
#define FIND(name)                                     \
    do {                                               \
        void *found = dlsym(handle, #name);            \
        memcpy(&library->name, &found, sizeof(found)); \
        missing = found == NULL ? #name : missing;     \
    } while (0)
    FIND(ncclGetUniqueId);
    FIND(ncclCommInitRank);
    FIND(ncclCommDestroy);
    FIND(ncclGroupStart);
    FIND(ncclGroupEnd);
    FIND(ncclSend);
    FIND(ncclRecv);
    FIND(ncclGetErrorString);
#undef FIND
    return !missing || bench_fail(error, "NCCL has no %s", missing);
}
