"""Time the reference of fused_gemv on the CPU against plain PyTorch, as ratios.

The peer is what one writes without kernelhub: dequantise the weight to x's dtype with plain torch,
then `F.linear`. Both run in turn in one process; above 1, the reference is slower.

    python benchmarks/reference_gemv.py [--json PATH] [--size N] [--rounds R]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelhub import quantize
from kernelhub.backends.reference.fused_gemv import fused_gemv

try:
    from benchmarks.timing import interleaved, ratio, save
except ModuleNotFoundError:  # run as a script
    from timing import interleaved, ratio, save  # type: ignore[no-redef]

GROUP = 128


def int4_peer(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), dim=-1)
    n, k = packed.shape[0], 2 * packed.shape[1]
    groups = (codes.view(n, k // GROUP, GROUP).to(x.dtype) - 8) * scale.to(x.dtype).unsqueeze(-1)
    return F.linear(x, groups.view(n, k))


def fp8_peer(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    n, k = weight.shape
    blocks = weight.to(x.dtype).view(n // GROUP, GROUP, k // GROUP, GROUP)
    return F.linear(x, (blocks * scale.to(x.dtype)[:, None, :, None]).view(n, k))


def pairs(size: int, rows: int) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Reference and peer for each scheme, `[rows, size]` by `[size, size]`."""
    g = torch.Generator().manual_seed(rows)
    weight = torch.randn(size, size, generator=g)
    made: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {}

    def dense(dtype: torch.dtype, **epilogue: Any) -> tuple[Callable[[], Tensor], ...]:
        x, w = torch.randn(rows, size, generator=g).to(dtype), weight.to(dtype)
        plain = {"swiglu": lambda y: F.silu(y[:, : size // 2]) * y[:, size // 2 :]}
        after = plain.get(epilogue.get("activation", ""), lambda y: y)
        return lambda: fused_gemv(x, w, **epilogue), lambda: after(F.linear(x, w))

    made["dense fp32"] = dense(torch.float32)
    made["dense bf16"] = dense(torch.bfloat16)
    made["dense bf16 swiglu"] = dense(torch.bfloat16, activation="swiglu")
    packed, scale, _ = quantize.quantize_int4(weight, GROUP)
    codes, fp8_scale = quantize.quantize_fp8(weight)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(rows, size, generator=g).to(dtype)
        tag = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        made[f"int4 {tag}"] = (
            lambda x=x: fused_gemv(x, packed, None, scale),
            lambda x=x: int4_peer(x, packed, scale),
        )
        made[f"fp8 {tag}"] = (
            lambda x=x: fused_gemv(x, codes, None, fp8_scale),
            lambda x=x: fp8_peer(x, codes, fp8_scale),
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--size", type=int, default=4096, help="N and K, a multiple of 128")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    results = []
    print(f"{'scheme':20} {'M':>3} {'reference ms':>13} {'peer ms':>9} {'ratio':>6}")
    for rows in (1, 4, 16):
        for scheme, (reference, peer) in pairs(options.size, rows).items():
            error = (reference().float() - peer().float()).abs().max() / peer().float().abs().max()
            if not error < 0.05:
                raise SystemExit(f"{scheme}: reference and peer differ by {error:.1%}")
            times = interleaved({"reference": reference, "peer": peer}, rounds=options.rounds)
            best = {name: 1e3 * sorted(seen)[len(seen) // 2] for name, seen in times.items()}
            row = {
                "scheme": scheme,
                "rows": rows,
                "size": options.size,
                "reference_ms": best["reference"],
                "peer_ms": best["peer"],
                "ratio": ratio(times, "reference", "peer"),
            }
            results.append(row)
            print(
                f"{scheme:20} {rows:3} {row['reference_ms']:13.2f} {row['peer_ms']:9.2f} "
                f"{row['ratio']:6.2f}",
                flush=True,
            )
    save(options.json, results)


if __name__ == "__main__":
    main()
