"""Time the reference of fused_moe_gemv on the CPU against plain PyTorch, as ratios.

The peer is what one writes without kernelhub: for each expert in use, dequantise its weight to x's
dtype, `F.linear` over the rows routed to it, and add the weighted rows up with `index_add`. Both
run in turn in one process; above 1, the reference is slower. The peer rounds products to bf16
before they are weighted and added up; the reference, by its contract, does not. "fp32 peer" is the
same loop in fp32, rounded once at the end, which is what the contract asks for.

    python benchmarks/reference_moe.py [--json PATH] [--experts E] [--rounds R] [--threads T]

On a machine that is busy with other things, one thread gives the steadier ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelhub.backends.reference.fused_moe_gemv import fused_moe_gemv

try:
    from benchmarks.timing import interleaved, ratio, save
except ModuleNotFoundError:  # run as a script
    from timing import interleaved, ratio, save  # type: ignore[no-redef]

# Qwen3-30B-A3B; of its 128 experts as many as fit beside each other (--experts).
HIDDEN, INTERMEDIATE, TOP_K = 2048, 768, 8
GROUP = 128


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One expert's weight in `dtype`, as plain PyTorch code has it."""
    if scale is None:
        return weight.to(dtype)
    if weight.dtype is torch.uint8:
        codes = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)
        groups = (codes.to(dtype) - 8).unflatten(1, (-1, GROUP))
        return (groups * scale.to(dtype).unsqueeze(-1)).flatten(1)
    n, k = weight.shape
    blocks = weight.to(dtype).view(n // GROUP, GROUP, k // GROUP, GROUP)
    return (blocks * scale.to(dtype)[:, None, :, None]).view(n, k)


def peer(
    x: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None = None,
    weight_scale: Tensor | None = None,
    activation: str | None = None,
    reduce: bool = False,
) -> Tensor:
    """gate-up (shared rows, SwiGLU) or, with `reduce`, down (a row for each slot, weighted)."""
    tokens, slots = topk_ids.shape
    width = weight.shape[1] // (2 if activation else 1)
    out = x.new_zeros((tokens, width) if reduce else (tokens, slots, width))
    for e in topk_ids.unique().tolist():
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        scale = None if weight_scale is None else weight_scale[e]
        rows = x[token] if x.dim() == 2 else x[token, slot]
        y = F.linear(rows, dequantize(weight[e], scale, x.dtype))
        if activation:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        if topk_weights is not None:
            y = y * topk_weights[token, slot].to(y.dtype).unsqueeze(1)
        if reduce:
            out.index_add_(0, token, y)
        else:
            out[token, slot] = y
    return out


def arguments(scheme: str, layer: str, tokens: int, experts: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    gate_up = layer == "gate-up"
    n, k = (2 * INTERMEDIATE, HIDDEN) if gate_up else (HIDDEN, INTERMEDIATE)
    slots = min(TOP_K, experts)
    lead = (tokens,) if gate_up else (tokens, slots)
    made: dict[str, Any] = {
        "x": torch.randn(*lead, k, generator=g).bfloat16(),
        "topk_ids": torch.rand(tokens, experts, generator=g).argsort(dim=1)[:, :slots],
    }
    if scheme == "int4":
        made["weight"] = torch.randint(0, 256, (experts, n, k // 2), generator=g).byte()
        made["weight_scale"] = torch.rand(experts, n, k // GROUP, generator=g) / 32
    else:
        made["weight"] = torch.randn(experts, n, k, generator=g).bfloat16()
        if scheme == "fp8":
            made["weight"] = made["weight"].to(torch.float8_e4m3fn)
            made["weight_scale"] = torch.rand(experts, n // GROUP, k // GROUP, generator=g)
    if gate_up:
        return made | {"activation": "swiglu"}
    made["topk_weights"] = torch.rand(tokens, slots, generator=g)
    return made | {"reduce": True}


def compare(scheme: str, layer: str, tokens: int, experts: int, rounds: int) -> dict[str, Any]:
    made = arguments(scheme, layer, tokens, experts)
    ours, theirs = fused_moe_gemv(**made).float(), peer(**made).float()
    off = ((ours - theirs).norm() / theirs.norm()).item()
    if not off < 0.02:  # the peer rounds to bf16 on the way
        raise RuntimeError(f"{scheme} {layer}: results differ by {off:.3f}, nothing to compare")
    x = made["x"]
    variants = {
        "reference": lambda: fused_moe_gemv(**made),
        "peer": lambda: peer(**made),
        "fp32 peer": lambda: peer(**{**made, "x": x.float()}).to(x.dtype),
    }
    times = interleaved(variants, rounds=rounds)
    return {
        "scheme": scheme,
        "layer": layer,
        "tokens": tokens,
        "experts": experts,
        "reference_ms": statistics.median(times["reference"]) * 1e3,
        "peer_ms": statistics.median(times["peer"]) * 1e3,
        "ratio": ratio(times, "reference", "peer"),
        "fp32_peer_ms": statistics.median(times["fp32 peer"]) * 1e3,
        "fp32_ratio": ratio(times, "reference", "fp32 peer"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, E = {options.experts}")
    print(
        f"{'scheme':8}{'layer':9}{'M':>3}{'reference ms':>14}{'peer ms':>10}{'ratio':>8}"
        f"{'fp32 peer ms':>14}{'ratio':>8}"
    )
    figures = []
    for scheme in ("bf16", "fp8", "int4"):
        for layer in ("gate-up", "down"):
            for tokens in (1, 4, 16):
                one = compare(scheme, layer, tokens, options.experts, options.rounds)
                figures.append(one)
                print(
                    f"{scheme:8}{layer:9}{tokens:3}{one['reference_ms']:14.1f}"
                    f"{one['peer_ms']:10.1f}{one['ratio']:8.2f}"
                    f"{one['fp32_peer_ms']:14.1f}{one['fp32_ratio']:8.2f}",
                    flush=True,
                )
    save(options.json, figures)


if __name__ == "__main__":
    main()
