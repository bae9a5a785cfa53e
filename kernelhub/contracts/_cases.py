"""Tensors for the test cases: seeded values in layouts that kernels get wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def normal(
    g: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> torch.Tensor:
    """Standard normal values times `scale`, rounded to `dtype`."""
    return (torch.randn(tuple(shape), generator=g) * scale).to(dtype)


def padded_rows(t: torch.Tensor, pad: int = 3) -> torch.Tensor:
    """The same values with `pad` unused elements after each row (last stride stays 1)."""
    wide = unused(*t.shape[:-1], t.shape[-1] + pad, dtype=t.dtype)
    view = wide[..., : t.shape[-1]]
    view.copy_(t)
    return view


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions swapped in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_second(t: torch.Tensor) -> torch.Tensor:
    """The same values, last stride 2."""
    wide = unused(*t.shape, 2, dtype=t.dtype)
    view = wide[..., 0]
    view.copy_(t)
    return view


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, starting one element past an aligned address."""
    flat = unused(t.numel() + 1, dtype=t.dtype)
    view = flat[1:].view(t.shape)
    view.copy_(t)
    return view


def unused(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory whose every byte is 0xFF: NaN in floating types, so that reading it shows."""
    t = torch.empty(shape, dtype=dtype)
    if t.numel():
        t.view(torch.uint8).fill_(0xFF)
    return t
