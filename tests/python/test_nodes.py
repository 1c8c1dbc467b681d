# SPDX-License-Identifier: MIT
"""Ranks of several nodes, which the network joins: the same calls."""

import subprocess
import sys
import threading

import deep_ep
import epx
import numpy as np
import pytest
import ranks
import test_elastic
import test_frameworks
import test_low_latency
import test_normal
import torch
from ranks import Rank
from reference import experts_of, make_batches

# Two ranks that only loopback joins, or why there is no network.
PROBE = """
import epx, sys, threading

def join(bootstrap, node):
    try:
        network = epx.Network(device="lo")
        epx.Group(bootstrap, heap_bytes=1 << 20, network=network, node=node)
    except epx.UnsupportedError as error:
        print(error)

threads = [threading.Thread(target=join, args=(it, node))
           for node, it in enumerate(epx.bootstrap.threads(2), 1)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.fixture(scope="module", autouse=True)
def network() -> None:
    said = subprocess.check_output([sys.executable, "-c", PROBE]).decode()
    if said:
        pytest.skip(f"NOT CHECKED between nodes: {said.splitlines()[0]}")


def join_by(wires: list[str]) -> list[str]:
    """What a group of two nodes says, whose ranks want these wires."""
    said = [""] * len(wires)

    def join(bootstrap: epx.bootstrap.Bootstrap, rank: int) -> None:
        try:
            network = epx.Network(device="lo", wire=wires[rank])
            with epx.Group(
                bootstrap, heap_bytes=16 << 20, network=network, node=rank + 1
            ) as group:
                x = np.full((2, 4096), group.rank + 1, np.float32)
                plan = group.plan(np.array([[0, 1], [1, -1]]), 2)
                out = plan.combine(plan.dispatch(x).x).x
                np.testing.assert_array_equal(out, x * [[2], [1]])
        except BaseException as error:
            said[rank] = f"{type(error).__name__}: {error}"

    threads = [
        threading.Thread(target=join, args=(it, rank))
        for rank, it in enumerate(epx.bootstrap.threads(len(wires)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_the_wire() -> None:
    assert join_by(["rma", "rma"]) == ["", ""]
    for said in join_by(["am", "rma"]):
        assert said.startswith("GroupError") and "EPX_NET_WIRE" in said, said


def test_the_groups_config() -> None:
    found, failed = {}, []

    def join(bootstrap: epx.bootstrap.Bootstrap, node: int) -> None:
        try:
            network = epx.Network(device="lo", transports="tcp", num_lanes=1)
            with epx.Group(
                bootstrap, heap_bytes=16 << 20, network=network, node=node
            ) as group:
                info = group.info()
                found[group.rank] = (info.num_nodes, info.node)
                x = np.full((2, 8), group.rank + 1, np.float32)
                plan = group.plan(np.array([[0, 1], [1, -1]]), 2)
                rows = plan.dispatch(x).x
                assert rows.shape == (2 + 2 * group.rank, 8)
                out = plan.combine(rows).x
                np.testing.assert_array_equal(out, x * [[2], [1]])
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=join, args=(it, 7 - rank))
        for rank, it in enumerate(epx.bootstrap.threads(2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert found == {0: (2, 0), 1: (2, 1)}


def layout_by_node(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group)
    num_experts = 10
    batch = make_batches(me, [33], 64, num_experts, 4)[me.index]
    per_rank, per_node, _, goes, _ = buffer.get_dispatch_layout(
        batch.topk_idx, num_experts
    )
    assert per_rank.tolist() == goes.sum(0).tolist()
    assert per_node.dtype == torch.int32
    firsts = [experts_of(me, num_experts, it)[0] for it in (0, 2)]
    spans = zip(firsts, (firsts[1], num_experts))
    wanted = [
        ((batch.topk_idx >= first) & (batch.topk_idx < end)).any(dim=1).sum()
        for first, end in spans
    ]
    assert per_node.tolist() == wanted
    elastic = deep_ep.ElasticBuffer(me.group, 8 << 20)
    assert elastic.get_physical_domain_size() == (2, 2)
    assert elastic.get_logical_domain_size() == (1, 4)


def test_layout() -> None:
    ranks.run(4, layout_by_node, nodes=2)


def high_throughput(me: Rank) -> None:
    buffer = deep_ep.Buffer(me.group, 64 << 20, 64 << 20)
    batches = make_batches(
        me, [37, 64, 0, 5], test_normal.H, test_normal.E, test_normal.K
    )
    for mode in (
        test_normal.Mode("bfloat16"),
        test_normal.Mode("bfloat16", False, True, True),
        test_normal.Mode("fp8", True, True, False),
    ):
        test_normal.check_mode(me, buffer, batches, mode)


def test_high_throughput() -> None:
    ranks.run(4, high_throughput, nodes=2)


@pytest.mark.parametrize(
    "function, arguments",
    [
        (test_frameworks.vllm_high_throughput, (True,)),
        (test_frameworks.sglang, ()),
    ],
)
def test_frameworks_calls(function, arguments) -> None:
    ranks.run(4, function, *arguments, nodes=2)


def test_low_latency_calls() -> None:
    ranks.run(4, test_low_latency.every_mode, [7, 0, 24, 1], nodes=2)


def elastic(me: Rank) -> None:
    buffer = test_elastic.buffer_for(me)
    batches = make_batches(
        me, [40, 3, 0, 17], test_elastic.H, test_elastic.E, test_elastic.K
    )
    for synced in (False, True):
        mode = test_elastic.Mode(fp8=not synced, synced=synced)
        test_elastic.check_by_rank(me, buffer, batches, mode)
        test_elastic.check_expanded(me, buffer, batches, mode, synced)


def test_elastic_calls() -> None:
    ranks.run(4, elastic, nodes=2)
