"""Weights as the GEMV ops take them, from the values that they stand for."""

from __future__ import annotations

import torch

from kernelhub import quantize


def operands(scheme: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight `[..., N, K]`: "dense" is bf16, "fp8" in blocks, "int4" in groups of 128."""
    if scheme == "dense":
        return {"weight": weight.bfloat16()}
    if scheme == "fp8":
        return dict(zip(("weight", "weight_scale"), quantize.quantize_fp8(weight), strict=True))
    packed, scale, _ = quantize.quantize_int4(weight, group_size=128, zero_point=False)
    return {"weight": packed, "weight_scale": scale.bfloat16()}
