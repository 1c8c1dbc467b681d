/* SPDX-License-Identifier: MIT */
/*
 * EPX - Expert-Parallel eXchange
 *
 * EPX moves the tokens of a Mixture-of-Experts layer to the ranks that hold
 * their experts (dispatch) and brings the experts' outputs back, summed
 * (combine).  The whole stable interface is in this header.
 *
 * Life of one layer, on every rank:
 *
 *     epx_group_create(&config, &group);              once
 *     epx_plan_create(group, &routing, stream, &plan);  who sends what where
 *     epx_plan_counts(plan, &counts);                 how much arrives here
 *     epx_dispatch(plan, &dispatch, stream);          tokens -> experts
 *     ... run the local experts on the received rows ...
 *     epx_combine(plan, &combine, stream);            outputs -> tokens
 *
 * The plan serves the backward pass too: the gradient of a dispatch is a
 * combine on the same plan, and the gradient of a combine is a dispatch.
 *
 * Symbols used in the comments
 *
 *     R, r   ranks in the group; this rank
 *     T      tokens of this rank in this batch
 *     T_max  the most tokens any rank sends (max_tokens_per_rank)
 *     H      hidden size, in elements
 *     K      top-k: experts per token
 *     E, L   experts in all; experts local to a rank
 *     S      scales per row
 *
 * Arrays are row-major; [T, K] has T rows of K elements.
 *
 * Experts are placed in contiguous blocks: with q = E / R and m = E mod R,
 * the first m ranks hold q + 1 experts each and the others q.
 *
 * Collective calls must be made by every rank of the group, and must run in the
 * same order on all of them.  Those that take a stream run in stream order:
 * with a CPU group a stream is an epx_queue_t of that group, or NULL to run
 * inside the call.  One queue keeps the order by itself; a caller who uses
 * several, or a queue and NULL, synchronizes between calls that could overtake
 * each other.
 *
 * Errors.  Every function returns an epx_status_t (or a plain value when it
 * cannot fail).  On failure epx_last_error() is one sentence, for this thread,
 * that names the value and what is allowed.  A call that fails in its own
 * arguments changes nothing and may be made again, corrected.  No wait for a
 * peer lasts longer than the group's timeout; calls that wait for a queue also
 * wait for what the caller has put there.  A group that has failed can only be
 * destroyed, or go on without the ranks that failed it (epx_group_mask); until
 * it is destroyed its peers may still write to the buffers of the operations
 * that were open.  EPX never aborts, exits, installs a signal handler or
 * writes to the environment, and prints only when EPX_LOG (error, warn, info)
 * asks for it.
 *
 * Threads.  A group may be used from several threads, in the order above; calls
 * on one plan must not overlap.  Different groups are independent.
 *
 * Structs that are passed in start with a `size` field; set it with the
 * matching _INIT macro.  Fields are only ever added at the end, and zero always
 * means the default, so that older callers go on working.
 */
#ifndef EPX_EPX_H
#define EPX_EPX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) || defined(__clang__)
#define EPX_API __attribute__((visibility("default")))
#else
#define EPX_API
#endif

#define EPX_VERSION_MAJOR 0
#define EPX_VERSION_MINOR 1
#define EPX_VERSION_PATCH 0

/* Limits of this version. */
#define EPX_MAX_TOPK    64   /* experts per token */
#define EPX_MAX_RANKS   1024 /* ranks per group */
#define EPX_ROW_ALIGN   16   /* a row is a multiple of this many bytes */
#define EPX_MAX_BIAS    2    /* bias rows that a combine can add */
#define EPX_SCALE_BLOCK 128  /* channels that share one scale */

/* ------------------------------------------------------------------------- */
/* Status                                                                    */
/* ------------------------------------------------------------------------- */

/* name, value, meaning.  Grouped by what is hurt. */
#define EPX_STATUS_MAP(X)                                                \
    X(EPX_OK, 0, "success")                                              \
    /* the call: nothing has changed, it can be made again, corrected */ \
    X(EPX_ERR_NULL, -1, "a required pointer is null")                    \
    X(EPX_ERR_INVALID, -2, "an argument is outside its range")           \
    X(EPX_ERR_SHAPE, -3, "a shape is not possible here")                 \
    X(EPX_ERR_DTYPE, -4, "an element type is not possible here")         \
    X(EPX_ERR_EXPERT, -5, "an expert index is out of range")             \
    X(EPX_ERR_TOO_SMALL, -6, "a buffer is too small")                    \
    X(EPX_ERR_WRONG_GROUP, -7, "the object belongs to another group")    \
    X(EPX_ERR_STATE, -8, "not possible in the object's present state")   \
    X(EPX_ERR_UNSUPPORTED, -9, "not supported by this build or machine") \
    X(EPX_ERR_ENVIRONMENT, -10, "an environment variable is unusable")   \
    /* resources: nothing has changed */                                 \
    X(EPX_ERR_NO_MEMORY, -20, "out of memory")                           \
    X(EPX_ERR_HEAP_EXHAUSTED, -21, "the group's heap is exhausted")      \
    X(EPX_ERR_SYSTEM, -22, "a system call failed")                       \
    /* a peer: the group can no longer be used, except to destroy it or  \
     * to go on without a rank */                                        \
    X(EPX_ERR_TIMEOUT, -40, "a peer did not answer in time")             \
    X(EPX_ERR_PEER_LOST, -41, "a peer went away")                        \
    X(EPX_ERR_PEER_DATA, -42, "a peer sent an impossible value")         \
    X(EPX_ERR_AUTH, -43, "a peer does not hold the job's secret")        \
    X(EPX_ERR_ABORTED, -44, "a rank has aborted the group")              \
    X(EPX_ERR_MASKED, -45, "the other ranks go on without this one")     \
    /* the group: every rank sees the same error */                      \
    X(EPX_ERR_MISMATCH, -60, "the ranks do not agree")                   \
    X(EPX_ERR_CAPACITY, -61, "the routing exceeds the fixed capacity")   \
    X(EPX_ERR_BROKEN, -62, "the group has failed earlier")

typedef enum epx_status {
#define EPX_STATUS_ENUM(name, value, text) name = value,
    EPX_STATUS_MAP(EPX_STATUS_ENUM)
#undef EPX_STATUS_ENUM
} epx_status_t;

/* The meaning of a status, a static string; never NULL. */
EPX_API const char *epx_status_string(epx_status_t status);

/* One sentence on the calling thread's last failure, "" if there was none.
 * Valid until the thread's next call that fails. */
EPX_API const char *epx_last_error(void);

/* ------------------------------------------------------------------------- */
/* Element types                                                             */
/* ------------------------------------------------------------------------- */

typedef enum epx_dtype {
    EPX_F32 = 1,
    EPX_F16,    /* IEEE 754 binary16 */
    EPX_BF16,   /* upper half of binary32 */
    EPX_F8E4M3, /* OCP FP8 E4M3 (finite only, 448 the largest) */
    EPX_F8E5M2, /* OCP FP8 E5M2 */
    EPX_BYTES,  /* opaque bytes; H counts bytes; dispatch only */
    EPX_I32,    /* indices, packed scales */
    EPX_I64,    /* indices */
} epx_dtype_t;

/* Bytes per element; 0 for a value that is not an epx_dtype_t. */
EPX_API size_t epx_dtype_size(epx_dtype_t dtype);

/* ------------------------------------------------------------------------- */
/* Bootstrap: how the ranks of a group first meet                            */
/* ------------------------------------------------------------------------- */

/*
 * A bootstrap is one blocking allgather over the ranks.  Fill in your own over
 * any launcher or framework, or take a ready-made one below (for an existing
 * MPI_Comm see epx/epx_mpi.h).  It is used only inside epx_group_create and
 * must stay valid until that returns; one bootstrap can make several groups,
 * one after the other.
 */
typedef struct epx_bootstrap {
    size_t size;
    int32_t rank;
    int32_t num_ranks;
    /*
     * Gather `bytes` bytes from every rank: recv is [num_ranks, bytes], in rank
     * order.  Every rank passes the same `bytes`.  Must return EPX_OK, or an
     * error by the deadline (nanoseconds of CLOCK_MONOTONIC).
     */
    epx_status_t (*allgather)(void *context, const void *send, void *recv,
                              size_t bytes, int64_t deadline_ns);
    /* Releases context; may be NULL.  Called by epx_bootstrap_destroy. */
    void (*destroy)(void *context);
    void *context;
} epx_bootstrap_t;

#define EPX_BOOTSTRAP_INIT { sizeof(epx_bootstrap_t), 0, 0, 0, 0, 0 }

/*
 * The ranks that a launcher started, from their environment:
 *
 *     torchrun, epx-run   RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
 *     Open MPI            OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE
 *     PMIx                PMIX_RANK with PMIX_SIZE or SLURM_NTASKS
 *     Slurm               SLURM_PROCID SLURM_NTASKS
 *
 * Rank 0 listens on EPX_PORT at MASTER_ADDR; the default port is MASTER_PORT +
 * 1, since frameworks use MASTER_PORT themselves.  Where the launcher gives no
 * address and all ranks are on this host, 127.0.0.1 and a port derived from the
 * job's id serve.  The id is EPX_JOB_ID, else TORCHELASTIC_RUN_ID, else
 * PMIX_NAMESPACE, else SLURM_JOB_ID with SLURM_STEP_ID; ranks with another id
 * are turned away.
 *
 * Only holders of the job's secret are admitted (HMAC-SHA256 challenge and
 * response, both ways).  The secret is 64 hexadecimal digits in EPX_SECRET, or
 * the contents of the file EPX_SECRET_FILE; without either it is the file
 * .config/epx/secret in the home directory, made on first use, readable by its
 * owner alone.
 *
 * Blocks until every rank has joined or timeout_ns has passed (0: 30 s); the
 * error then names the ranks that are missing.  Collective.  The caller owns
 * the bootstrap.
 */
EPX_API epx_status_t epx_bootstrap_env_create(uint64_t timeout_ns,
                                              epx_bootstrap_t **bootstrap_p);

/*
 * num_ranks threads of one process: fills bootstraps_p[0..num_ranks-1], one
 * for each thread, each to be destroyed by itself.  Not collective.
 */
EPX_API epx_status_t
epx_bootstrap_threads_create(int32_t num_ranks, epx_bootstrap_t **bootstraps_p);

/* Releases a bootstrap that EPX made.  NULL is allowed. */
EPX_API void epx_bootstrap_destroy(epx_bootstrap_t *bootstrap);

/* ------------------------------------------------------------------------- */
/* Group                                                                     */
/* ------------------------------------------------------------------------- */

/* R ranks, one engine, one heap per rank, and a way to every peer. */
typedef struct epx_group epx_group_t;

typedef enum epx_device {
    EPX_DEVICE_CPU = 0,
    EPX_DEVICE_CUDA,
} epx_device_t;

/*
 * How ranks of different nodes reach each other: by UCX, which is loaded when
 * it is needed (docs/networking.md).  -1 leaves a number to UCX, and so to its
 * environment variables.  Of interest on this rank alone.
 */
typedef struct epx_network_config {
    size_t size;
    /* The network interface or device that is used, and no other: "eth0",
     * "mlx5_0:1".  NULL: EPX_NET_DEVICE, else the first interface that is up
     * and not loopback. */
    const char *device;
    /* UCX's transports: "tcp", "rc,ud".  NULL: "tcp" on an interface, "all" on
     * a device. */
    const char *transports;
    int32_t service_level;    /* InfiniBand: 0..15 */
    int32_t traffic_class;    /* RoCE, InfiniBand across subnets: 0..255 */
    int32_t gid_index;        /* RoCE: 0..255 */
    int32_t adaptive_routing; /* InfiniBand: 0 or 1 */
    int32_t num_lanes;        /* devices or ports that a message is spread over:
                                 1..16 */
    int32_t core;             /* that the network's thread is pinned to; -1:
                                 none */
    /* How bytes move: "am" by UCX's active messages, "rma" by puts into memory
     * of the peer, "auto" by puts where transports of InfiniBand or RoCE do
     * them (docs/networking.md).  All ranks must come to the same, else
     * epx_group_create fails with EPX_ERR_MISMATCH.  NULL: EPX_NET_WIRE, else
     * "auto". */
    const char *wire;
    /* EPX_DEVICE_CUDA: whether the network reads and writes rows in the card's
     * memory itself (GPUDirect RDMA), which takes puts.  1: yes, or
     * EPX_ERR_UNSUPPORTED; 0: they go through the host's memory.  -1:
     * EPX_NET_GPUDIRECT, else where the adapter can.  Ranks may differ. */
    int32_t gpudirect;
} epx_network_config_t;

#define EPX_NETWORK_CONFIG_INIT \
    { sizeof(epx_network_config_t), 0, 0, -1, -1, -1, -1, -1, -1, 0, -1 }

typedef struct epx_group_config {
    size_t size;
    /* NULL: epx_bootstrap_env_create is used for this group alone. */
    const epx_bootstrap_t *bootstrap;
    /* The same on every rank.  EPX_DEVICE_CUDA needs the shared library
     * (libepx.so), which loads its module for CUDA, libepx_cuda.so.0, from its
     * own folder. */
    epx_device_t device;
    /* Which card, as CUDA counts those that this process sees; 0 with
     * EPX_DEVICE_CPU.  Several ranks may share a card. */
    int32_t device_ordinal;
    /* Bytes of this rank's heap; ranks may differ.  The host's memory is taken
     * from the system as it is first touched, a card's at once.  0: 1 GiB. */
    uint64_t heap_bytes;
    /* Threads (CPU) or SMs (CUDA) that one operation uses on this rank; on the
     * CPU the caller's thread is one of them.  0: on the CPU this rank's usable
     * cores divided by the ranks that share them, at least 1; on a card its
     * SMs, or half of them divided by the ranks that share it, at most 24.
     * Since an operation waits for its peers, the SMs of all ranks that share a
     * card must fit it, with room for the kernels that the peers run before
     * theirs.
     */
    int32_t num_workers;
    /* The largest E of any plan; the same on every rank.  0: 1024. */
    int32_t max_experts;
    /* How long any wait for a peer may take.  0: 30 s. */
    uint64_t timeout_ns;
    /* A peer that gives no sign of life for so long is lost; the same on every
     * rank.  Raise it to stop a rank in a debugger.  0: 1 s.  See
     * epx_group_status. */
    uint64_t lost_after_ns;
    /* NULL: the defaults. */
    const epx_network_config_t *network;
    /* Ranks with different numbers never share memory, as if they were on
     * different hosts.  0: EPX_NODE, else they share it wherever they can. */
    int32_t node;
} epx_group_config_t;

#define EPX_GROUP_CONFIG_INIT \
    { sizeof(epx_group_config_t), 0, EPX_DEVICE_CPU, 0, 0, 0, 0, 0, 0, 0, 0 }

/*
 * Makes a group.  Collective; blocks until all ranks have joined.  A rank whose
 * own config is unusable tells the others, so that every rank fails at once
 * with a sentence that names it.
 *
 * The first fabric that can joins the ranks of a node.  Ranks that none joins
 * are on different nodes, which are joined by UCX.  EPX_ERR_UNSUPPORTED tells
 * why that cannot be, or what of a device is missing.
 *
 *     CPU   thread       threads of one process
 *           shm          processes of one host
 *     CUDA  cuda_thread  threads of one process
 *           cuda_vmm     processes of one host, by file descriptors of memory
 *           cuda_ipc     processes of one host, by CUDA IPC handles
 *           cuda_fabric  also ranks on several hosts, where NVLink reaches from
 *                        one to the other and the driver is set up for it
 *
 * Cards must reach each other's memory (NVLink or PCIe peer access).
 * EPX_CUDA_FABRIC=vmm, ipc or fabric allows just that one of CUDA's.  With
 * cuda_ipc no rank may destroy its group while a peer is still at work in it.
 */
EPX_API epx_status_t epx_group_create(const epx_group_config_t *config,
                                      epx_group_t **group_p);

/*
 * Releases the group with its heap.  Not collective: peers that still need this
 * rank's memory keep it until they let go of it.  Fails with EPX_ERR_STATE, and
 * changes nothing, while plans or queues of the group are alive.  NULL is
 * allowed.
 */
EPX_API epx_status_t epx_group_destroy(epx_group_t *group);

/*
 * EPX_OK, or the error that broke the group.  Does not block.
 *
 * All ranks fail together, with one sentence: what a rank finds it tells its
 * peers at once, and every wait ends, also those of kernels.  A call that waits
 * returns that error; if none did, the next call does; then it is
 * EPX_ERR_BROKEN.  A rank is lost (EPX_ERR_PEER_LOST) when its process ends
 * without epx_group_destroy, at once, or when it gives no sign of life for
 * lost_after_ns, since it is stopped, say; nobody watches it while a group is
 * made but for the end of its process.  What a kernel finds is told by the next
 * call.  Peers that cuda_ipc or cuda_fabric join over network namespaces
 * (containers) or hosts are not watched, and told nothing: what is lost or
 * fails there is missed when timeout_ns is over.
 */
EPX_API epx_status_t epx_group_status(const epx_group_t *group);

/*
 * Breaks the group: calls of this rank that wait for a peer, and those of its
 * peers, end at once with EPX_ERR_ABORTED.  From any thread, at any time before
 * epx_group_destroy.  Kernels that wait end, too, and the stream goes on. Peers
 * that epx_group_status does not reach are late, then.
 */
EPX_API epx_status_t epx_group_abort(epx_group_t *group);

/*
 * Goes on without some ranks: ranks is [num_ranks], of others than this one,
 * and may be NULL when there are none; those that are known to be lost are
 * masked too, and what peers mask.  Collective over the ranks that remain, who
 * need not name the same ranks; each calls it when an operation has failed.
 * Returns when all of them have agreed on who is masked: from then on nobody
 * waits for a masked rank, the tokens for its experts are dropped (they count
 * as -1; see num_dropped in epx_counts), and nothing comes from it.  Ranks and
 * experts keep their numbers.  Once masked a rank stays so, and whatever it
 * calls fails with EPX_ERR_MASKED, but for what destroys.
 *
 * Plans are given up: they can be destroyed, and those with max_tokens_per_rank
 * can be given new routing; anything else is EPX_ERR_STATE.  An operation that
 * was open has failed, also one that epx_complete would have finished.  Ranks
 * may have been at different operations when the failure found them: where to
 * go on is theirs to agree on.  In a group that works, too, what a peer has not
 * completed by then fails.  Synchronize queues, and streams that run graphs,
 * first; no collective call of this rank may run meanwhile.  Graphs that were
 * captured before are of no use, and have to be captured again.
 *
 * A rank that was stopped and goes on may still finish rows that it was writing
 * to EPX memory that was open to it: docs/failures.md.
 *
 * EPX_OK at once when no rank is new and the group has not failed.
 * EPX_ERR_TIMEOUT names the ranks that did not call in time, or tells that
 * nobody is known to be lost and nobody was named; the call can then be made
 * again, with those ranks.  EPX_ERR_ABORTED names a rank that has aborted the
 * group, EPX_ERR_PEER_DATA what a rank has written to the list of the masked:
 * neither passes.  With several nodes only a majority of the ranks that are not
 * masked so far goes on: more than half, or half with the lowest of them, so
 * that two parts of a network that has fallen apart do not both.  For the
 * others it is EPX_ERR_PEER_LOST, for good.  EPX_ERR_UNSUPPORTED where
 * hosts share no memory (see epx_group_status).
 */
EPX_API epx_status_t epx_group_mask(epx_group_t *group, const int32_t *ranks,
                                    int32_t num_ranks);

/* Who is masked, as far as this rank has agreed to: masked_p is [R] and gets 1
 * for those, 0 for others.  Local, from any thread. */
EPX_API epx_status_t epx_group_masked(const epx_group_t *group,
                                      int32_t *masked_p);

typedef struct epx_group_info {
    size_t size;
    int32_t rank;
    int32_t num_ranks;
    int32_t num_workers;
    int32_t max_experts;
    const char *engine;  /* "cpu", "cuda" */
    const char *fabric;  /* of this node: "thread", "shm", "cuda_thread", ... */
    uint64_t heap_bytes; /* usable bytes of this rank's heap */
    uint64_t heap_free_bytes; /* with what is given back when asked for */
    uint64_t heap_largest_free_bytes; /* in one piece, without that */
    int32_t num_nodes;
    int32_t node; /* this rank's; nodes count from that of rank 0 */
} epx_group_info_t;

#define EPX_GROUP_INFO_INIT \
    { sizeof(epx_group_info_t), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 }

EPX_API epx_status_t epx_group_query(const epx_group_t *group,
                                     epx_group_info_t *info);

/* ------------------------------------------------------------------------- */
/* Memory                                                                    */
/* ------------------------------------------------------------------------- */

/*
 * Memory of this rank's heap, which its peers can reach: buffers in it move in
 * one hop, without a staging copy.  Aligned to 4096 bytes, contents undefined;
 * 0 bytes give a pointer too. Local, thread-safe.  Not released by destroying
 * plans; all of it goes with the group.  EPX_ERR_HEAP_EXHAUSTED tells how much
 * is left; before that, on a card, what operations have used is given back,
 * once the last of them has run.
 */
EPX_API epx_status_t epx_mem_alloc(epx_group_t *group, uint64_t bytes,
                                   void **ptr_p);

/* NULL is allowed.  EPX_ERR_WRONG_GROUP when ptr is not from this group. */
EPX_API epx_status_t epx_mem_free(epx_group_t *group, void *ptr);

/* ------------------------------------------------------------------------- */
/* Streams                                                                   */
/* ------------------------------------------------------------------------- */

/*
 * An epx_queue_t* (CPU) or a cudaStream_t (CUDA); NULL runs in the call (CPU)
 * or on the default stream (CUDA).
 *
 * The rest of this comment is about CUDA groups.
 *
 * Arrays.  All arrays of routing, dispatch and combine are memory that the card
 * reaches; epx_mem_alloc's is the card's own.
 *
 * Waiting.  Calls return once their kernels are on the stream.  Only what needs
 * counts on the host waits for them: epx_plan_counts, and a dispatch or combine
 * of a plan with neither recv_capacity nor EPX_LAYOUT_EXPERT_SLOTS.
 *
 * Order.  The calls of one group run one after the other also when their
 * streams differ; launches of graphs the caller puts in that order.  A stream
 * must stay valid until the plans that used it last are destroyed or have moved
 * to another.
 *
 * Graphs.  Updates, dispatches and combines of a plan with recv_capacity, or of
 * EPX_LAYOUT_EXPERT_SLOTS, can be captured, on every rank alike.  Destroy the
 * plan only when the graph will not run again.
 *
 * Errors.  What the device finds (a peer that is late, ranks that disagree)
 * breaks the group, and is reported by the next call and epx_group_status.
 * Routing that is bad on one rank, or too much for the capacity, is refused on
 * every rank: nothing moves, and the next call on its plan reports it.
 *
 * Sharing.  The SMs of all groups at work on a card at once must fit it.  Ranks
 * that are threads need streams of their own, and as many hardware queues as
 * streams: CUDA_DEVICE_MAX_CONNECTIONS=32.
 */
typedef void *epx_stream_t;

/* Runs what it is given in order, on a thread of its own. */
typedef struct epx_queue epx_queue_t;

/*
 * Local.  A queue stops at its first error: what follows is skipped until
 * epx_queue_synchronize has reported the error.
 */
EPX_API epx_status_t epx_queue_create(epx_group_t *group,
                                      epx_queue_t **queue_p);

/* Runs what is queued, then releases the queue.  NULL is allowed.  Returns the
 * queue's error, if epx_queue_synchronize has not yet reported it. */
EPX_API epx_status_t epx_queue_destroy(epx_queue_t *queue);

/* Runs fn(arg) in order.  fn may not submit to, synchronize or destroy the
 * same queue. */
EPX_API epx_status_t epx_queue_submit(epx_queue_t *queue, void (*fn)(void *arg),
                                      void *arg);

/* Blocks until everything queued has run; returns, and clears, the first error
 * (its sentence is this thread's epx_last_error). */
EPX_API epx_status_t epx_queue_synchronize(epx_queue_t *queue);

/* ------------------------------------------------------------------------- */
/* Plan: the routing of one batch                                            */
/* ------------------------------------------------------------------------- */

typedef struct epx_plan epx_plan_t;

/* How received tokens lie in memory.  See docs/design.md for drawings. */
typedef enum epx_layout {
    /* [num_recv, H]: by source rank, then source token.  A token comes once,
     * however many local experts it goes to; recv_topk_idx says which. */
    EPX_LAYOUT_RANK_MAJOR = 1,
    /* [num_rows, H]: by local expert, each expert's rows padded to a multiple
     * of expert_alignment, then source rank, then token; one row for each
     * (token, expert).  Padding rows are zero. */
    EPX_LAYOUT_EXPERT_MAJOR,
    /* [L, R * T_max, H] with a count per expert; an expert's rows are packed at
     * its front, by source rank, then token. */
    EPX_LAYOUT_EXPERT_SLOTS,
} epx_layout_t;

typedef struct epx_plan_args {
    size_t size;
    epx_layout_t layout;   /* same on every rank */
    int32_t num_experts;   /* E >= 1, at most max_experts; same everywhere */
    int32_t topk;          /* K, 1..64; same on every rank */
    epx_dtype_t idx_dtype; /* EPX_I32 or EPX_I64; same on every rank */
    int64_t num_tokens;    /* T >= 0 */
    /* [T, K] expert indices, -1 for none.  The experts of one token must
     * differ.  May be NULL when T is 0.  Read in stream order, not kept. */
    const void *topk_idx;
    /* T_max: the most tokens that any rank will ever route through this plan;
     * same on every rank.  0: this batch's counts decide, and the plan cannot
     * be updated.  Required by EPX_LAYOUT_EXPERT_SLOTS. */
    int64_t max_tokens_per_rank;
    /* Rows of every rank's receive buffer when that is to be fixed, so that
     * nobody need ask for counts; same on every rank.  0: exact counts.  Not
     * for EXPERT_SLOTS, where L * R * T_max rows are fixed already. */
    int64_t recv_capacity;
    /* EXPERT_MAJOR: rows of an expert are padded to a multiple of this; same on
     * every rank.  0: 1. */
    int32_t expert_alignment;
    /* Bytes of the widest row, payload plus scales, that a dispatch with
     * EPX_SEND_ONLY will carry; same on every rank.  With it (and T_max) such a
     * send never waits for a peer: the plan keeps 2 * R * T_max receive slots
     * in the heap, which epx_complete unpacks; only making the plan waits for
     * the peers, in stream order.  Whether recv_rows suffices is then known
     * only to epx_complete, whose EPX_ERR_TOO_SMALL ends the operation.  0: a
     * send-only dispatch waits until its peers have entered theirs, and writes
     * rows to their places. */
    int64_t send_only_row_bytes;
} epx_plan_args_t;

#define EPX_PLAN_ARGS_INIT       \
    {                            \
        sizeof(epx_plan_args_t), \
        (epx_layout_t)0,         \
        0,                       \
        0,                       \
        EPX_I64,                 \
        0,                       \
        0,                       \
        0,                       \
        0,                       \
        0,                       \
        0                        \
    }

/*
 * Makes a plan from this rank's routing and tells the peers its counts.
 * Collective, asynchronous in stream order: does not wait for the peers.
 * EPX_ERR_EXPERT when an index is outside -1..E-1 or twice in a token.  Without
 * a stream that is returned here and nothing has happened; with a queue it is
 * the queue's error.
 */
EPX_API epx_status_t epx_plan_create(epx_group_t *group,
                                     const epx_plan_args_t *args,
                                     epx_stream_t stream, epx_plan_t **plan_p);

/*
 * New routing for a plan that was made with max_tokens_per_rank: num_tokens in
 * 0..T_max, topk_idx as in epx_plan_args_t.  Collective, stream order.
 */
EPX_API epx_status_t epx_plan_update(epx_plan_t *plan, int64_t num_tokens,
                                     const void *topk_idx, epx_stream_t stream);

typedef struct epx_counts { /* not the function's name, for C++ */
    size_t size;
    int64_t num_rows;          /* rows that this rank's receive buffer needs:
                                  num_recv, num_rows with padding, or
                                  L * R * T_max; recv_capacity if fixed */
    int64_t num_recv_tokens;   /* distinct tokens that arrive here */
    int64_t num_recv_rows;     /* rows that arrive here, padding left out */
    int32_t first_expert;      /* this rank's experts are first_expert .. */
    int32_t num_local_experts; /* .. first_expert + num_local_experts - 1 */
    /* Owned by the plan, valid until it is updated or destroyed. */
    const int64_t *rank_tokens; /* [R] tokens that arrive from each rank */
    const int64_t *expert_rows; /* [L] (token, expert) pairs per local expert */
    const int64_t *expert_offsets; /* [L + 1] first row of each local expert in
                                   EXPERT_MAJOR and EXPERT_SLOTS; the last entry
                                   is the end; zero in RANK_MAJOR */
    /* Entries of this rank's topk_idx whose expert's rank is masked: they count
     * as -1. */
    int64_t num_dropped;
} epx_plan_counts_t;

#define EPX_PLAN_COUNTS_INIT \
    { sizeof(epx_plan_counts_t), 0, 0, 0, 0, 0, 0, 0, 0, 0 }

/*
 * Blocks the host until the plan's counts are known: everything before it on
 * the plan's stream has run and every peer has told its counts.  Local.
 */
EPX_API epx_status_t epx_plan_counts(epx_plan_t *plan,
                                     epx_plan_counts_t *counts);

/*
 * Local.  Fails with EPX_ERR_STATE while a send-only operation of the plan is
 * not complete, unless the group is broken.  Waits for what is queued on the
 * plan's stream; with CUDA the plan's memory is reused once that has run, and
 * nobody waits.  NULL is allowed.
 */
EPX_API epx_status_t epx_plan_destroy(epx_plan_t *plan);

/* ------------------------------------------------------------------------- */
/* Dispatch                                                                  */
/* ------------------------------------------------------------------------- */

/*
 * How rows are quantised.  On dispatch: x is BF16, rows arrive as F8E4M3 with
 * one scale for each block of 128 channels (the last block may be short).  With
 *
 *     amax = max(1e-4, max |x| over the block; NaNs count as 0), in float32
 *
 * the scale and the value sent are, all in IEEE single precision,
 *
 *     F32     scale = amax * (1 / 448)
 *             q = e4m3(x * (448 / amax))
 *
 *     POW2    scale = 2 ^ ceil(log2(amax * (1 / 448)))
 *             q = e4m3(x * (1 / scale))
 *
 *     UE8M0   as POW2; only the scale's biased 8-bit exponent is sent
 *
 * where e4m3 rounds to nearest even, saturates at 448 and keeps NaN.  F32 and
 * POW2 send float32 scales, S = ceil(H / 128).  UE8M0 packs four exponents in
 * an int32, the lowest byte first, S = ceil(ceil(H / 128) / 4); unused bytes
 * are 0.  A block with an infinity has an infinite scale (exponent 255): its
 * numbers are sent as 0, its infinities as NaN.
 *
 * LOGFMT10 is for combine: BF16 as a sign and a level of 9 bits, on a
 * logarithmic scale between the smallest and the largest magnitude of each
 * block of 64 channels (the last block may be short).  With b = log2(largest /
 * smallest), at most 32, a value comes back with a relative error of at most
 * b / 1465 + 2^-14; less than 2^-32 of the largest may become zero.  Zeros,
 * infinities and NaNs stay what they are.
 *
 * The formats, their sources and examples are in docs/formats.md.
 */
typedef enum epx_quantize {
    EPX_QUANTIZE_NONE = 0,
    EPX_QUANTIZE_F8E4M3_F32,
    EPX_QUANTIZE_F8E4M3_POW2,
    EPX_QUANTIZE_F8E4M3_UE8M0,
    EPX_QUANTIZE_LOGFMT10,
} epx_quantize_t;

#define EPX_LOGFMT_BLOCK 64 /* channels that share a range */

/* Only start the transfer; epx_complete finishes it. */
#define EPX_SEND_ONLY 1u

/*
 * Dispatch: new routing comes with the call, which then means
 *
 *     epx_plan_update(plan, num_tokens, topk_idx, stream);
 *     epx_dispatch(plan, the other arguments, stream);
 *
 * in one: an engine may save a launch and a wait.  For plans that can be
 * updated and whose receive rows are fixed (EXPERT_SLOTS, or recv_capacity);
 * one that knows no routing yet is made with num_tokens 0.  When the dispatch
 * fails the routing may have been taken in.
 */
#define EPX_NEW_ROUTING 2u

/*
 * Every array may lie in EPX memory or anywhere else, aligned to its element.
 * What peers write (recv_*) goes through a staging block of the heap when it
 * lies elsewhere, which costs one more copy.  Whether topk_weights and scales
 * are given must be the same on every rank; the other optional arrays are each
 * rank's own choice.  A pointer to no elements may be NULL.
 *
 * Arrays named recv_* have one row for each received row, in the plan's layout.
 * Rows beyond the received ones are not written, except that padding rows of
 * EXPERT_MAJOR are zeroed (recv_src_token: -1).
 */
typedef struct epx_dispatch_args {
    size_t size;
    const void *x;     /* [T, H]; may be NULL when T is 0 */
    int64_t hidden;    /* H; a row is a multiple of 16 bytes, both
                          before and after quantisation */
    epx_dtype_t dtype; /* of x; not an index type */
    epx_quantize_t quantize;
    /* Scales of rows that are already quantised, num_scales of 4 bytes each
     * (float32, or four packed UE8M0): element (t, j) is
     * scales[t * scale_token_stride + j * scale_stride].  A stride of 0 means
     * S, or 1: together [T, S]. */
    const void *scales;
    int32_t num_scales; /* S, 0 for none; quantize gives it by itself */
    int64_t scale_token_stride;
    int64_t scale_stride;
    const float *topk_weights; /* [T, K], optional */

    void *recv_x;      /* [recv_rows, H] */
    int64_t recv_rows; /* rows that the recv_* buffers hold; at least
                          the plan's num_rows */
    /* Element (row, j) is
     * recv_scales[row * recv_scale_row_stride + j * recv_scale_stride]; in
     * EXPERT_SLOTS row counts from the expert's start, which is
     * recv_scale_expert_stride elements after the one before.  A stride of 0
     * means S for rows, 1 for scales, and for experts the larger of R * T_max
     * row strides and S scale strides.  Required when scales are sent. */
    void *recv_scales;
    int64_t recv_scale_row_stride;
    int64_t recv_scale_stride;
    int64_t recv_scale_expert_stride;
    /* RANK_MAJOR only: [recv_rows, K] of the plan's idx_dtype; local expert
     * indices, -1 where the expert is not on this rank.  Optional. */
    void *recv_topk_idx;
    /* RANK_MAJOR [recv_rows, K], 0 where the expert is not on this rank; else
     * [recv_rows].  Required when topk_weights is given. */
    float *recv_topk_weights;
    int32_t *recv_src_token; /* [recv_rows] index of the token at its source;
                                optional */
    /* [L] (token, expert) pairs that each local expert received; optional, for
     * this rank alone. */
    int32_t *recv_expert_counts;
    uint32_t flags;      /* 0, EPX_SEND_ONLY, EPX_NEW_ROUTING or both; same on
                            every rank */
    int32_t num_workers; /* 0: the group's; at most the group's */
    /* EPX_NEW_ROUTING only, as in epx_plan_update. */
    int64_t num_tokens;   /* T, 0..T_max */
    const void *topk_idx; /* [T, K]; may be NULL when T is 0 */
    /* [L], to each of which the (token, expert) pairs that arrived are added,
     * modulo 2^32; optional, for this rank alone. */
    int32_t *recv_expert_totals;
    /* [R], to each of which is added how long, in nanoseconds, this rank's
     * operation waited for that rank: for its arguments, for its rows, and on
     * the CPU for its counts if this operation is the first to need them.  Each
     * wait counts from its own beginning, so that those for several ranks
     * overlap.  epx_complete adds what it waits.  Rows of other nodes are not
     * counted.  Optional, for this rank alone. */
    int64_t *wait_ns;
    /* [T, K], set to 1 for entries that are dropped since their expert's rank
     * is masked (epx_group_mask), else 0; optional, for this rank alone. */
    uint8_t *dropped;
} epx_dispatch_args_t;

#define EPX_DISPATCH_ARGS_INIT     \
    { sizeof(epx_dispatch_args_t), \
      0,                           \
      0,                           \
      (epx_dtype_t)0,              \
      EPX_QUANTIZE_NONE,           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0,                           \
      0 }

/*
 * Sends this rank's tokens and receives those for its experts.  Collective,
 * stream order; the arrays must stay valid until it is complete.  Waits for the
 * counts if they are not yet known.
 *
 * EPX_ERR_CAPACITY, on every rank and before any row moves, when some rank
 * would receive more rows than the plan's fixed capacity.
 * EPX_ERR_MISMATCH when ranks disagree on dtype, H, quantize or the optional
 * arrays.
 */
EPX_API epx_status_t epx_dispatch(epx_plan_t *plan,
                                  const epx_dispatch_args_t *args,
                                  epx_stream_t stream);

/* ------------------------------------------------------------------------- */
/* Combine                                                                   */
/* ------------------------------------------------------------------------- */

/*
 * out[t] = bias[0][t] + bias[1][t] + sum of the rows that token t has in x on
 * all ranks.  Accumulated in float32 from +0, biases first, rounded once to
 * nearest even.  The order of the sum is part of the contract:
 *     RANK_MAJOR       over ranks, ascending; unweighted
 *     EXPERT_MAJOR, EXPERT_SLOTS   over k, ascending; with topk_weights each
 *                      term is one fused multiply-add
 * so in the expert layouts the result does not depend on how the experts are
 * spread over ranks.  A token without experts gets the biases, or zero.
 *
 * With several nodes, what another node has of a token is summed there, in this
 * order, and rounded to dtype (recv_topk_weights: float32); the owner adds that
 * as one term.  Nodes come in the order of their lowest ranks, the owner's own
 * with its rows one by one.  So the bits depend on which node an expert is on.
 *
 * With EPX_QUANTIZE_LOGFMT10, for BF16, each row of x counts as what it decodes
 * to once encoded, in float32, wherever it is read from; so does what another
 * node sums, once it is rounded.  Biases count as they are.  Between nodes rows
 * then take 0.66 of the bytes; within a node they are read where they lie, and
 * this only costs time.
 *
 * x may lie in EPX memory (peers read it in place) or anywhere else (one more
 * copy).  Which optional arrays are given must be the same on every rank, but
 * for bias and topk_weights, which concern the owner of the tokens alone.
 */
typedef struct epx_combine_args {
    size_t size;
    const void *x;     /* [num_rows, H], in the plan's layout */
    int64_t num_rows;  /* rows in x; at least the rows received */
    int64_t hidden;    /* H; a row is a multiple of 16 bytes */
    epx_dtype_t dtype; /* EPX_F32, EPX_F16 or EPX_BF16 */
    /* [T, K] weights of this rank's own tokens; not in RANK_MAJOR, where the
     * experts' side has applied them.  Optional. */
    const float *topk_weights;
    const void *bias[EPX_MAX_BIAS]; /* each [T, H] of dtype, optional */
    void *out;                      /* [T, H]; may be NULL when T is 0 */
    /*
     * The backward of the dispatch of topk_weights: recv_topk_weights is shaped
     * as in dispatch (RANK_MAJOR [num_rows, K], else [num_rows]), and
     * out_topk_weights[t][k] is, in RANK_MAJOR, the float32 sum of element k of
     * the rows of token t over ranks, ascending, from +0; else the element of
     * the row of (t, k), 0 where topk_idx was -1.  Both or neither.
     */
    const float *recv_topk_weights;
    float *out_topk_weights; /* [T, K] */
    uint32_t flags;          /* 0 or EPX_SEND_ONLY; same on every rank */
    int32_t num_workers;     /* 0: the group's; at most the group's */
    int64_t *wait_ns;        /* [R], as in epx_dispatch_args_t */
    epx_quantize_t quantize; /* NONE or LOGFMT10; same on every rank */
} epx_combine_args_t;

#define EPX_COMBINE_ARGS_INIT     \
    { sizeof(epx_combine_args_t), \
      0,                          \
      0,                          \
      0,                          \
      (epx_dtype_t)0,             \
      0,                          \
      { 0, 0 },                   \
      0,                          \
      0,                          \
      0,                          \
      0,                          \
      0,                          \
      0,                          \
      EPX_QUANTIZE_NONE }

/*
 * Collective, stream order.  x may be changed again once the call is complete.
 * A send-only combine announces x and returns without waiting for any peer.
 */
EPX_API epx_status_t epx_combine(epx_plan_t *plan,
                                 const epx_combine_args_t *args,
                                 epx_stream_t stream);

/*
 * The receive hook: finishes the plan's send-only dispatch or combine.  A plan
 * has at most one such operation open, and the group may have started at most 7
 * further collective operations since (plans created or updated, dispatches,
 * combines); an 8th fails with EPX_ERR_STATE.  Collective, stream order; may be
 * called from another thread, and on another stream, than the send, provided
 * that the send has run by then.
 */
EPX_API epx_status_t epx_complete(epx_plan_t *plan, epx_stream_t stream);

/* ------------------------------------------------------------------------- */
/* The library                                                               */
/* ------------------------------------------------------------------------- */

typedef struct epx_library_info {
    size_t size;
    const char *version;        /* "0.1.0" */
    const char *const *engines; /* NULL-terminated; epx_device_query tells
                                   whether "cuda" finds a card */
    const char *const *fabrics; /* NULL-terminated: of these engines */
    const char *cpu_isa;        /* the CPU kernels in use: "avx512", ... */
    int32_t num_cores;          /* that this process may run on */
} epx_library_info_t;

#define EPX_LIBRARY_INFO_INIT { sizeof(epx_library_info_t), 0, 0, 0, 0, 0 }

EPX_API epx_status_t epx_library_query(epx_library_info_t *info);

/* What a group can work on. */
typedef struct epx_device_info {
    size_t size;
    int32_t num_devices;   /* of this kind that this process sees */
    int32_t num_workers;   /* usable cores, or SMs */
    int32_t compute_major; /* CUDA's compute capability; 0 with CPUs */
    int32_t compute_minor;
    uint64_t memory_bytes; /* in all */
    char name[96];         /* "NVIDIA H100 80GB HBM3", "x86_64" */
    char pci[16];          /* "0000:3b:00.0"; "" with CPUs */
    /* NULL-terminated: those that can join ranks on this device. */
    const char *fabrics[8];
    /* Bit i: the memory of device i can be reached from this one (its own bit
     * is set), and with atomic operations, as NVLink has them. */
    uint64_t reachable_devices;
    uint64_t fast_devices;
} epx_device_info_t;

#define EPX_DEVICE_INFO_INIT \
    { sizeof(epx_device_info_t), 0, 0, 0, 0, 0, { 0 }, { 0 }, { 0 }, 0, 0 }

/*
 * Device `ordinal` of a kind; 0 is the first.  EPX_ERR_UNSUPPORTED tells what
 * is missing: the module for CUDA, a driver, a card.  Starts CUDA in this
 * process, which a fork does not survive.
 */
EPX_API epx_status_t epx_device_query(epx_device_t device, int32_t ordinal,
                                      epx_device_info_t *info);

/* The experts of `rank`: first_p and count_p, by the rule at the top of this
 * page. */
EPX_API epx_status_t epx_local_experts(int32_t num_experts, int32_t num_ranks,
                                       int32_t rank, int32_t *first_p,
                                       int32_t *count_p);

#ifdef __cplusplus
}
#endif
#endif /* EPX_EPX_H */
