"""The sampling reference against a straightforward sampler in plain torch, on the CPU.

    python benchmarks/reference_sampling.py [--json PATH]

Both run in this process, turn about; the ratio is of the medians. The plain sampler sorts, cuts,
and draws with `torch.multinomial`: floating-point masses, no ties, no seeds of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernelhub.backends.reference.top_k_top_p_sampling_from_probs import (
    top_k_top_p_sampling_from_probs as reference,
)

SHAPES = ((1, 32000), (1, 128256), (8, 32000), (8, 128256), (32, 32000), (32, 128256))
SETTINGS = {
    "per-row k and p": (50, 0.9, True),
    "k = 50, p = 0.9": (50, 0.9, False),
    "p = 0.9": (0, 0.9, False),
    "off": (0, 1.0, False),
}


def sort_sampler(probs: Tensor, top_k: int | Tensor, top_p: float | Tensor) -> Tensor:
    """Top-k, then top-p among the survivors, then one draw, in the order of the sorted row."""
    vocab_size = probs.shape[1]
    if isinstance(top_k, Tensor):
        top_k, top_p = top_k[:, None], torch.as_tensor(top_p)[:, None]
    elif top_k <= 0:
        top_k = vocab_size
    ranked, tokens = probs.sort(descending=True)
    ranked = ranked.masked_fill(torch.arange(vocab_size, device=probs.device) >= top_k, 0.0)
    ranked = ranked / ranked.sum(-1, keepdim=True)
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
    drawn = ranked.multinomial(1)
    return tokens.gather(-1, drawn)[:, 0].int()


def compare(repeats: int = 9) -> list[dict[str, Any]]:
    """One row per shape and setting: median milliseconds of both and their ratio."""
    g = torch.Generator().manual_seed(0)
    results = []
    for rows, vocab_size in SHAPES:
        probs = torch.softmax(torch.randn(rows, vocab_size, generator=g) * 3, -1)
        for setting, (k, p, per_row) in SETTINGS.items():
            top_k = torch.full((rows,), k) if per_row else k
            top_p = torch.full((rows,), p) if per_row else p
            ours, plain = _interleaved(
                partial(reference, probs, top_k, top_p, seed=1),
                partial(sort_sampler, probs, top_k, top_p),
                repeats,
            )
            results.append(
                {
                    "shape": [rows, vocab_size],
                    "setting": setting,
                    "reference_ms": ours,
                    "plain_ms": plain,
                    "ratio": ours / plain,
                }
            )
    return results


def _interleaved(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int
) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            if repeat > 0:  # the first round warms up
                taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    results = compare()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'shape':>12}  {'setting':<16} {'reference':>11} {'plain':>11} {'ratio':>6}")
    for row in results:
        shape = "x".join(map(str, row["shape"]))
        times = f"{row['reference_ms']:>8.2f} ms {row['plain_ms']:>8.2f} ms"
        print(f"{shape:>12}  {row['setting']:<16} {times} {row['ratio']:>6.2f}")
    print(f"largest ratio {max(row['ratio'] for row in results):.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
