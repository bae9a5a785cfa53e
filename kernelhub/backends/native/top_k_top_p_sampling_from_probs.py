"""top_k_top_p_sampling_from_probs by the compiled kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernelhub.backend import Implementation
from kernelhub.backends.native.kernels import Launchers, maker
from kernelhub.spec import Args

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


MOST_CLUSTER_BLOCKS = 16
"""That can share a row: `kMostHeldBlocks` of csrc/cuda/sampling_held.muh."""

MOST_LISTED_TOP_K = 1024
"""With which clusters list what top-k may keep: `kMostHeldK`."""

MOST_LISTED_VOCAB = 2**18
"""Of rows that they list: `kHeldLimit`."""

_MOST_SUMMED_VOCAB = 160_000
"""Flat rows of more have more to list than there is room for, and are read anew."""

_HELD = 2**14
"""Elements that a block can hold; half of them are held faster."""

_SMS = 132
"""Of an H100 and an H200, each of which takes two blocks."""


WAYS = ("hold", "list", "sum")
"""What the blocks of a cluster do with a row: they hold it, or read their parts in steps, for which
all samples must have one `top_k` of at most 1024 ("list") or none ("sum")."""


def cluster_blocks(arch: str, batch_size: int, vocab_size: int, way: str) -> int:
    """How many blocks of a cluster take a row of fp32; 0 where blocks that stream it do.

    Chosen on an H200.
    """
    if not arch.startswith("sm_90") or vocab_size % 4 or batch_size * vocab_size == 0:
        return 0
    if way == "sum":
        held = cluster_blocks(arch, batch_size, vocab_size, "hold")
        # Half of what a block can hold is held faster than summed.
        if held and (held * _HELD // 2 >= vocab_size or batch_size <= 8):
            return held
        blocks, share = 1, vocab_size >> 15
        if share > 1 and 8 * batch_size <= _SMS:
            blocks = 4
        elif (share > 1 and batch_size <= _SMS) or (share > 0 and 2 * batch_size <= _SMS):
            blocks = 2
        return blocks if blocks * _HELD < vocab_size <= _MOST_SUMMED_VOCAB else held
    if way == "list":
        if vocab_size > MOST_LISTED_VOCAB:
            return 0
        if _SMS < 2 * batch_size <= 2 * _SMS:  # two that hold the row, or read it in more steps
            return 2 if 2**13 < vocab_size <= 2**14 or vocab_size > 2**15 else 1
        if batch_size <= 8:
            most, share = MOST_CLUSTER_BLOCKS, 2**11 if vocab_size > 2**14 else 2**12
        else:
            most, share = min(4, _SMS // batch_size), 2**13
        blocks = 1
        while 2 * blocks <= most and blocks * share < vocab_size:
            blocks *= 2
        return blocks
    blocks, few = (_power_of_two(vocab_size / held) for held in (_HELD // 2, _HELD))
    if blocks * batch_size > _SMS and blocks > 2 and (few <= 2 or few * batch_size <= _SMS):
        blocks = few
    blocks = min(blocks, MOST_CLUSTER_BLOCKS)
    if blocks * _HELD < vocab_size or blocks * batch_size > 256:
        return 0
    if blocks > 4 and batch_size > 16:  # not all such clusters run at once
        return 0
    while (
        blocks < MOST_CLUSTER_BLOCKS
        and 2 * blocks * batch_size <= _SMS
        and blocks * 2**12 < vocab_size
    ):
        blocks *= 2
    return blocks


def _power_of_two(least: float) -> int:
    """The first that is not less."""
    return 1 << max(0, math.ceil(math.log2(least)))


def make(launchers: Launchers) -> Implementation:
    def prepare(a: Args) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
        launch = launchers[a.probs.device]
        num_rows, vocab_size = a.probs.shape
        batch_size = num_rows if a.indices is None else a.indices.shape[0]
        k_tensor, p_tensor, min_p_tensor, seed_tensor, offset_tensor = (
            isinstance(value, Tensor) for value in (a.top_k, a.top_p, a.min_p, a.seed, a.offset)
        )
        drawn = None
        if a.seed is None and num_rows and batch_size:
            drawn, seed_tensor = maker(a.probs, (1,), torch.int64), True
        joint = a.filter_apply_order == "joint"
        blocks = blocks_a_row(batch_size, vocab_size)
        held = listed = summed = 0
        if a.probs.dtype == torch.float32:
            arch = launchers.arch(a.probs.device)
            held, listed, summed = (
                cluster_blocks(arch, batch_size, vocab_size, way) for way in WAYS
            )
        tokens_for = maker(a.probs, (batch_size,), torch.int32)
        valid_for = maker(a.probs, (batch_size,), torch.bool) if a.return_valid else None
        workspace_for = None
        if blocks > 1:
            size = batch_size * blocks * WORKSPACE_BYTES
            workspace_for = maker(a.probs, (size,), torch.uint8)

        def run(
            probs: Tensor,
            top_k: int | Tensor,
            top_p: float | Tensor,
            min_p: float | Tensor | None,
            indices: Tensor | None,
            _filter_apply_order: str,
            _deterministic: bool,
            generator: torch.Generator | None,
            seed: int | Tensor | None,
            offset: int | Tensor | None,
            _return_valid: bool,
        ) -> Tensor | tuple[Tensor, Tensor]:
            if drawn:
                seed = drawn(probs).random_(generator=generator)
            tokens = tokens_for(probs)
            if k_tensor:
                clusters = held
            elif not 0 < top_k < vocab_size:
                # Of min-p alone the threshold is known when all is read: summing reads it twice.
                min_p_alone = not p_tensor and top_p >= 1 and (min_p_tensor or min_p)
                clusters = held if min_p_alone else summed
            else:
                clusters = listed if top_k <= MOST_LISTED_TOP_K else 0
            valid = valid_for(probs) if valid_for else None
            launch(
                probs,
                top_k if k_tensor else None,
                top_p if p_tensor else None,
                min_p if min_p_tensor else None,
                indices,
                seed if seed_tensor else None,
                offset if offset_tensor else None,
                tokens,
                valid,
                workspace_for(probs) if workspace_for and not clusters else None,
                0 if k_tensor else top_k,
                0 if p_tensor else top_p,
                0 if min_p_tensor or min_p is None else min_p,
                0 if seed_tensor or seed is None else seed,
                0 if offset_tensor or offset is None else offset,
                joint,
                1 if clusters else blocks,
                clusters,
            )
            return tokens if valid is None else (tokens, valid)

        return run

    return Implementation("top_k_top_p_sampling_from_probs", prepare=prepare)
