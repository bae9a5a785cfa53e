"""top_k_top_p_sampling_from_probs by the compiled kernel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native.kernels import Launchers

MOST_BLOCKS = 32
"""That can share a row: `kMaxBlocks` of the kernel."""

WORKSPACE_BYTES = 32816
"""Of each block, where several share a row: the size of the kernel's `Part`."""


def blocks_a_row(batch_size: int, vocab_size: int) -> int:
    """How many blocks share a row. One a row leaves most of a GPU idle where samples are few.

    Chosen on an H200: two blocks are slower than one, whose launch ends it, and more than 16 or
    less than 4000 elements a block gain nothing.
    """
    blocks = 1
    while blocks < 16 and 2 * blocks * batch_size <= 256 and blocks * 2**12 <= vocab_size:
        blocks *= 2
    return blocks if blocks > 2 else 1


def make(launchers: Launchers) -> Implementation:
    def top_k_top_p_sampling_from_probs(
        probs: Tensor,
        top_k: int | Tensor,
        top_p: float | Tensor,
        *,
        min_p: float | Tensor | None = None,
        indices: Tensor | None = None,
        filter_apply_order: Literal["top_k_first", "joint"] = "top_k_first",
        deterministic: bool = True,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
        offset: int | Tensor | None = None,
        return_valid: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        device = probs.device
        num_rows, vocab_size = probs.shape
        batch_size = num_rows if indices is None else indices.shape[0]
        if seed is None and num_rows and batch_size:
            seed = torch.empty(1, dtype=torch.int64, device=device).random_(generator=generator)
        tokens = torch.empty(batch_size, dtype=torch.int32, device=device)
        valid = torch.empty(batch_size, dtype=torch.bool, device=device) if return_valid else None
        blocks = blocks_a_row(batch_size, vocab_size)
        workspace = None
        if blocks > 1:
            size = batch_size * blocks * WORKSPACE_BYTES
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
        launchers[device](
            probs,
            *map(_if_tensor, (top_k, top_p, min_p, indices, seed, offset)),
            tokens,
            valid,
            workspace,
            *map(_if_number, (top_k, top_p, min_p, seed, offset)),
            filter_apply_order == "joint",
            blocks,
        )
        return tokens if valid is None else (tokens, valid)

    return Implementation("top_k_top_p_sampling_from_probs", top_k_top_p_sampling_from_probs)


def _if_tensor(value: float | Tensor | None) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _if_number(value: float | Tensor | None) -> float:
    return 0 if value is None or isinstance(value, Tensor) else value
