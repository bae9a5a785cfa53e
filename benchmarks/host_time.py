"""Host time of one eager call of a compiled kernel: ctypes beside the compiled launcher.

    python benchmarks/host_time.py [--backend cuda|simt] [--json FILE]

All variants run interleaved in one process. Reported is the least of the medians of several rounds,
in microseconds, from the call to its return: on a GPU the kernel is then queued, not finished. On
the `simt` backend the kernel's own time (a block of the emulator) is part of every row; `empty`
rows launch nothing, so that what remains is the host's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kernelhub
from kernelhub import plugins, provenance, registry
from kernelhub.backends.native import library

ROUNDS, CALLS = 30, 300


def variants(backend: str) -> dict[str, Callable[[], Any]]:
    plugins.load()
    made = registry.backends()[backend]
    device = torch.device(made.kernels.device_type, 0) if backend != "simt" else torch.device("cpu")
    kernels = made.kernels
    loaded = kernels.library(device)
    found: dict[str, Callable[[], Any]] = {}
    for label, tokens in (("one token", 1), ("empty", 0)):
        x, bias, out = (torch.randn(tokens, 2048, device=device) for _ in range(3))
        q = torch.randn(tokens, 32, 128, device=device)
        k = torch.randn(tokens, 8, 128, device=device)
        table = torch.randn(64, 128, device=device)
        positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        for fast in (False, True):
            way = "compiled" if fast else "ctypes"
            launch = {
                op: loaded.launcher(op, kernels.device_type, kernels.stream_of, fast=fast)
                for op in ("fused_mul_add", "rotary_embedding")
            }
            found[f"fused_mul_add, {label}: launcher in {way}"] = (
                lambda run=launch["fused_mul_add"], a=(x, bias, None, out, 2.0): run(*a)
            )
            found[f"rotary_embedding, {label}: launcher in {way}"] = (
                lambda run=launch["rotary_embedding"], a=(positions, q, k, table, None, 0, 1): run(
                    *a
                )
            )
        op, rope = (
            kernelhub.ops.fused_mul_add.on(backend),
            kernelhub.ops.rotary_embedding.on(backend),
        )
        found[f"fused_mul_add, {label}: whole call"] = lambda a=(x, bias, 2.0), o=out, f=op: f(
            *a, out=o
        )
        found[f"rotary_embedding, {label}: whole call"] = (
            lambda a=(positions, q, k, 128, table), f=rope: f(*a)
        )
        found[f"torch.add, {label}"] = lambda a=(bias, x), o=out: torch.add(*a, alpha=2.0, out=o)
    return found


def measure(found: dict[str, Callable[[], Any]], device_type: str) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for call in found.values():
        for _ in range(20):
            call()
    for _ in range(ROUNDS):
        for name, call in found.items():
            if device_type == "cuda":
                torch.cuda.synchronize()
            samples = []
            for _ in range(CALLS // 20):
                start = time.perf_counter()
                for _ in range(20):
                    call()
                samples.append((time.perf_counter() - start) / 20)
                if device_type == "cuda":
                    torch.cuda.synchronize()
            times[name].append(statistics.median(samples))
    return {name: min(medians) * 1e6 for name, medians in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="simt")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(
            variants(given.backend), registry.backends()[given.backend].kernels.device_type
        )
    device = torch.cuda.get_device_name(0) if given.backend == "cuda" else platform.processor()
    for name, us in found.items():
        print(f"{us:8.2f} us  {name}")
    if library.why_not_fast():
        print("no compiled launcher:", "; ".join(library.why_not_fast()))
    if given.json:
        facts = {
            **provenance.facts(),
            "device": device or platform.machine(),
            "microseconds": found,
        }
        given.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
