# SPDX-License-Identifier: MIT
"""What Python adds: to a low-latency call of deep_ep, and to import torch.

    python tools/bench/python_overhead.py
    python tools/bench/python_overhead.py --device cuda

One rank, one token, on one core: the calls differ in what surrounds the C call
alone, which is made once with deep_ep and once with its arguments ready.  What
is measured is the calling thread's own time, so that other programs do not
count.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, List

HIDDEN, CALLS, ROUNDS = 64, 500, 15

IMPORT = """
import time, torch
start = time.perf_counter()
import epx, deep_ep, deep_ep.utils
print(time.perf_counter() - start)
"""


def microseconds(*calls: Callable[[], Any]) -> List[float]:
    """The median of each call's rounds, which take turns."""
    import torch

    rounds: List[List[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, times in zip(calls, rounds):
            start = time.thread_time()
            for _ in range(CALLS):
                call()
            times.append((time.thread_time() - start) / CALLS * 1e6)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
    return [statistics.median(it) for it in rounds]


def call_overheads(device: str) -> "dict[str, float]":
    """Microseconds of calls of deep_ep, and of the C calls in them."""
    import deep_ep
    import torch
    import torch.distributed as dist
    from epx import _c

    torch.set_num_threads(1)
    folder = tempfile.mkdtemp()
    store = dist.FileStore(os.path.join(folder, "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16, device=device)
    topk_idx = torch.zeros(1, 1, dtype=torch.int64, device=device)
    weights = torch.ones(1, 1, device=device)
    counts = torch.zeros(1, dtype=torch.int32, device=device)
    out = torch.empty_like(x)

    def dispatch() -> Any:
        return buffer.low_latency_dispatch(x, topk_idx, 1, 1, use_fp8=False)

    rows = dispatch()[0]
    group = buffer._lanes.of(x).group
    plan = group.plan(topk_idx, 1, "EXPERT_SLOTS", max_tokens_per_rank=1)
    stream = group.stream_handle(None)
    received = group.empty((1, 1, HIDDEN), torch.bfloat16)
    sent = _c.DispatchArgs(
        x=x.data_ptr(),
        hidden=HIDDEN,
        dtype=_c.BF16,
        recv_x=received.data_ptr(),
        recv_rows=1,
        recv_expert_counts=counts.data_ptr(),
        flags=_c.NEW_ROUTING,
        num_tokens=1,
        topk_idx=topk_idx.data_ptr(),
    )
    back = _c.CombineArgs(
        x=rows.data_ptr(),
        num_rows=1,
        hidden=HIDDEN,
        dtype=_c.BF16,
        topk_weights=weights.data_ptr(),
        out=out.data_ptr(),
    )
    dispatched, dispatched_by_c = microseconds(
        dispatch,
        lambda: _c.lib.epx_dispatch(plan.handle, ctypes.byref(sent), stream),
    )
    handle = dispatch()[2]
    combined, combined_by_c = microseconds(
        lambda: buffer.low_latency_combine(
            rows, topk_idx, weights, handle, out=out
        ),
        lambda: _c.lib.epx_combine(plan.handle, ctypes.byref(back), stream),
    )
    return {
        "dispatch_us": dispatched,
        "dispatch_c_us": dispatched_by_c,
        "combine_us": combined,
        "combine_c_us": combined_by_c,
    }


def import_seconds() -> float:
    """Beyond PyTorch's, with everything in the page cache."""
    times = [
        float(subprocess.check_output([sys.executable, "-c", IMPORT]))
        for _ in range(3)
    ]
    return min(times)


def main() -> None:
    """Prints one line of JSON."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = options.parse_args().device
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = call_overheads(device)
    for name in ("dispatch", "combine"):
        added = found[f"{name}_us"] - found[f"{name}_c_us"]
        found[f"{name}_overhead_us"] = added
    found["import_s"] = import_seconds()
    print(json.dumps({name: round(it, 3) for name, it in found.items()}))


if __name__ == "__main__":
    main()
