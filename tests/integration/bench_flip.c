/* SPDX-License-Identifier: MIT */
/* Preloaded into epx-bench: spoils one bit of what a call gives, so that a test
 * can see whether --check finds it; or takes something at each call that it
 * never gives back, for --soak.  EPX_TEST_FLIP says which. */
#include <dlfcn.h>
#include <epx/epx.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define LEAK_BYTES ((size_t)1 << 20)

static int
is_chosen(const char *what)
{
    const char *chosen = getenv("EPX_TEST_FLIP");
    return chosen && !strcmp(chosen, what);
}

static void
flip_if(const char *call, void *byte)
{
    if (is_chosen(call)) {
        *(unsigned char *)byte ^= 1;
    }
}

static void
leak_if(void)
{
    static void *volatile kept;
    if (is_chosen("memory")) {
        kept = malloc(LEAK_BYTES);
        memset(kept, 1, LEAK_BYTES);
    }
    if (is_chosen("file")) {
        (void)open("/dev/null", O_RDONLY);
    }
}

EPX_API epx_status_t
epx_dispatch(epx_plan_t *plan, const epx_dispatch_args_t *args,
             epx_stream_t stream)
{
    epx_status_t (*real)(epx_plan_t *, const epx_dispatch_args_t *,
                         epx_stream_t);
    *(void **)&real = dlsym(RTLD_NEXT, "epx_dispatch");
    epx_status_t status = real(plan, args, stream);
    leak_if();
    flip_if("dispatch", args->recv_x);
    flip_if("weights", args->recv_topk_weights);
    return status;
}

EPX_API epx_status_t
epx_combine(epx_plan_t *plan, const epx_combine_args_t *args,
            epx_stream_t stream)
{
    epx_status_t (*real)(epx_plan_t *, const epx_combine_args_t *,
                         epx_stream_t);
    *(void **)&real = dlsym(RTLD_NEXT, "epx_combine");
    epx_status_t status = real(plan, args, stream);
    flip_if("combine", args->out);
    return status;
}

EPX_API epx_status_t
epx_mem_free(epx_group_t *group, void *ptr)
{
    epx_status_t (*real)(epx_group_t *, void *);
    *(void **)&real = dlsym(RTLD_NEXT, "epx_mem_free");
    return is_chosen("heap") ? EPX_OK : real(group, ptr);
}

EPX_API epx_status_t
epx_plan_counts(epx_plan_t *plan, epx_plan_counts_t *counts)
{
    epx_status_t (*real)(epx_plan_t *, epx_plan_counts_t *);
    *(void **)&real = dlsym(RTLD_NEXT, "epx_plan_counts");
    epx_status_t status = real(plan, counts);
    flip_if("counts", &counts->num_recv_tokens);
    return status;
}
