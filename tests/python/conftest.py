# SPDX-License-Identifier: MIT
"""Which devices the tests run on."""

import os
import sys

import pytest

# Ranks are forked: to ask whether there is a card may not start CUDA here.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# gloo would ask the network for this host's name.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test are."""
    if request.param == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("NOT CHECKED on a card: there is none here")
    return request.param
