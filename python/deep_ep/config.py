# SPDX-License-Identifier: MIT
"""DeepEP's tuning knobs, of which EPX needs one: how many SMs to use."""

import dataclasses

# What a heap is made for, unless its caller says otherwise: the rows of so
# many tokens of each rank, for up to so many ranks, received and sent back.
_TOKENS = 4096
_RANKS = 8
_ALIGNMENT = 2 << 20


def round_up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-value // step) * step


@dataclasses.dataclass
class Config:
    """``num_sms`` is used; the chunk sizes are taken and have no meaning."""

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int
    ) -> int:
        """Bytes with which batches of 4096 tokens a rank move in one hop.

        Larger ones work too, through a copy where there is no room.
        """
        rows = _TOKENS * min(num_ranks, _RANKS)
        return round_up(2 * rows * hidden_bytes, _ALIGNMENT)

    def get_rdma_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int
    ) -> int:
        """Nothing: all memory is in one heap."""
        return 0
