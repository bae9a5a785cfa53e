"""Runs every op on shapes of real models, beside the float64 truth.

The backend is the one that kernelhub chooses on this machine; set KERNELHUB_BACKEND to force one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kernelhub
from kernelhub import quantize
from kernelhub.testing import compare

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Call = tuple[str, str, dict[str, Any]]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def calls() -> Iterator[Call]:
    """(op, what it is in the model, arguments)"""
    hidden, intermediate = 4096, 14336
    x = normal(1, hidden)
    yield "fused_gemv", "Llama-3-8B attention output, bf16", {
        "x": x, "weight": normal(hidden, hidden, scale=hidden**-0.5),
    }  # fmt: skip
    packed = quantize.quantize_int4(normal(2 * intermediate, hidden, scale=0.02), 128)
    yield "fused_gemv", "Llama-3-8B gate-up with SwiGLU, int4", {
        "x": x, "weight": packed[0], "weight_scale": packed[1], "activation": "swiglu",
    }  # fmt: skip
    experts, hidden, intermediate, k = 16, 2048, 768, 8
    ids = torch.rand(4, experts).topk(k).indices
    weight, scale = quantize.quantize_fp8(normal(experts, 2 * intermediate, hidden, scale=0.02))
    yield "fused_moe_gemv", "Qwen3-30B-A3B experts gate-up, fp8 blocks (16 of 128 experts)", {
        "x": normal(4, hidden), "weight": weight, "topk_ids": ids, "weight_scale": scale,
        "activation": "swiglu",
    }  # fmt: skip
    yield "fused_moe_gemv", "Qwen3-30B-A3B experts down, summed, bf16 (16 of 128 experts)", {
        "x": normal(4, k, intermediate),
        "weight": normal(experts, hidden, intermediate, scale=0.02),
        "topk_ids": ids, "topk_weights": torch.rand(4, k).softmax(-1), "reduce": True,
    }  # fmt: skip
    heads, kv_heads, size, tokens = 32, 8, 128, 64
    qkv = normal(tokens, (heads + 2 * kv_heads) * size)
    angles = torch.arange(4096)[:, None] * 500_000 ** (-torch.arange(0, size, 2) / size)
    yield "rotary_embedding", "Llama-3-8B query and key, slices of packed QKV", {
        "positions": torch.arange(1000, 1000 + tokens), "query": qkv[:, : heads * size],
        "key": qkv[:, heads * size : (heads + kv_heads) * size], "head_size": size,
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], -1),
    }  # fmt: skip
    yield "fused_mul_add", "DeepSeek-V3 routed * 2.5 + shared", {
        "x": normal(16, 7168), "bias": normal(16, 7168), "scale": 2.5,
    }  # fmt: skip
    probs = (torch.randn(2, 32_000) * 3).softmax(-1)
    yield "top_k_top_p_sampling_from_probs", "Llama-2 vocabulary, top-k 40, top-p 0.9", {
        "probs": probs, "top_k": 40, "top_p": 0.9, "seed": torch.tensor([7, 8]),
    }  # fmt: skip


def copied(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Fresh tensors on a device; slices of one tensor become slices of one copy."""
    storages: dict[int, Tensor] = {}

    def copy(t: Tensor) -> Tensor:
        base = t if t._base is None else t._base
        if id(base) not in storages:
            storages[id(base)] = base.clone().to(device)
        return storages[id(base)].as_strided(t.shape, t.stride(), t.storage_offset())

    return {n: copy(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}


def seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name: str, what: str, arguments: dict[str, Any]) -> tuple[bool, list[str]]:
    op, spec = kernelhub.op(name), kernelhub.op(name).spec
    placed = copied(arguments, DEVICE)
    selection = op.explain(**placed)
    result = op(**placed)
    written = [placed[p.name] for p in spec.params if p.role == "in_place" and p.name in placed]
    outputs = ([] if result is None else [result]) + written
    args = spec.bind(**copied(arguments, torch.device("cpu")))
    truth = spec.oracle(args, None)
    worst = max(compare(e, got) for e, got in zip(truth, outputs, strict=False))
    spent = seconds(lambda: op(**placed))
    exact = all(float(e.bound.abs().max()) == 0 for e in truth)
    verdict = "exact" if exact and worst == 0 else f"{worst:.3f} of bound"
    rate = spec.cost(args).bytes / spent / 1e9
    mark = "[green]yes[/]" if worst <= 1 else "[red]NO[/]"
    cells = [f"{name}\n[dim]{what}[/]", str(selection.backend), f"{spent * 1e3:.2f}", f"{rate:.1f}"]
    return worst <= 1, [*cells, verdict, mark]


def main() -> int:
    torch.manual_seed(0)
    table = Table(title=f"kernelhub on {DEVICE} (torch {torch.__version__})", show_lines=True)
    for column in ("op and its place in the model", "backend", "ms", "GB/s", "error", "correct"):
        table.add_column(
            column, justify="left" if column.startswith("op") else "right", overflow="fold"
        )
    verdicts = []
    for name, what, arguments in calls():
        good, cells = row(name, what, arguments)
        verdicts.append(good)
        table.add_row(*cells)
    console = Console()
    console.print(table)
    console.print(
        "backend: who ran the op, chosen from the tensors' device.\n"
        "error: largest distance from the float64 result, as a share of its bound.\n"
        "Next: `kernelhub explain` says why a backend was chosen, `kernelhub check` runs\n"
        "every case of every op, `kernelhub doctor` looks around."
    )
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
