"""Pieces of the error bounds. All values are float64; u is the unit roundoff, half an ulp at 1."""

from __future__ import annotations

import torch

FP32_UNIT = 2.0**-24
_FP32_TINY = torch.finfo(torch.float32).tiny  # accelerators may flush fp32 subnormals to zero


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest in `dtype`: 2^-24, 2^-11, 2^-8."""
    return torch.finfo(dtype).eps / 2


def rounded(value: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bound on the result when something within `error` of `value` is rounded once to `dtype`."""
    tiny = max(_FP32_TINY, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    return error + unit_roundoff(dtype) * (value.abs() + error) + tiny
