"""Host time of one eager call of every op, from Python to the launch, beside torch's own ops.

    python benchmarks/host_time.py [--backend cuda|simt] [--json FILE]

All variants run interleaved in one process. Reported is the least of the medians of several rounds,
in microseconds, from the call to its return: on a GPU the kernel is then queued, not finished.
What is timed:

- `one token`: one token, the kernel launched. On the `simt` backend the kernel's own time (a block
  of the emulator) is part of it.
- `no launch`: the same, but that a C function which does nothing stands for the kernel. This is
  what kernelhub and torch's allocator cost.
- `empty`: no token. The kernel's own launcher, if it is called at all, launches nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import kernelhub
from kernelhub import plugins, provenance, registry
from kernelhub.backend import Backend
from kernelhub.backends.native import library
from kernelhub.backends.native.kernels import Kernels
from kernelhub.bench.inputs import Maker

ROUNDS, CALLS = 30, 300

NOTHING = ctypes.CDLL(None).pthread_equal
"""Takes two pointers, returns 0 as they differ, and does nothing."""

Calls = dict[str, tuple[str, dict[str, Any]]]


def calls(device: torch.device, tokens: int) -> Calls:
    """From a label to an op and its arguments."""
    make = Maker.on(device, 0)
    dtype, k, n, experts = torch.bfloat16, 2048, 4096, 8
    x = make.normal(tokens, k, dtype=dtype)
    int4 = {
        "weight": make.codes(n, k // 2),
        "weight_scale": make.uniform(n, k // 128, dtype=dtype),
        "weight_zero": make.codes(n, k // 128) & 15,
    }
    rope = {
        "positions": torch.zeros(tokens, dtype=torch.int64, device=device),
        "query": make.normal(tokens, 32, 128, dtype=dtype),
        "key": make.normal(tokens, 8, 128, dtype=dtype),
        "head_size": 128,
        "cos_sin_cache": make.normal(64, 128, dtype=torch.float32),
    }
    moe = {name: value.expand(experts, *value.shape) for name, value in int4.items()}
    moe = {name: value.contiguous() for name, value in moe.items()}
    moe["topk_ids"] = torch.zeros(tokens, 2, dtype=torch.int64, device=device)
    probs = torch.softmax(make.normal(tokens, 2048, dtype=torch.float32), -1)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    return {
        "fused_mul_add": ("fused_mul_add", {"x": x, "bias": x.clone(), "scale": 2.0}),
        "rotary_embedding": ("rotary_embedding", rope),
        "fused_gemv, bf16": ("fused_gemv", {"x": x, "weight": make.normal(n, k, dtype=dtype)}),
        "fused_gemv, int4": ("fused_gemv", {"x": x, **int4}),
        "fused_moe_gemv, int4": ("fused_moe_gemv", {"x": x, **moe}),
        "sampling": (
            "top_k_top_p_sampling_from_probs",
            {"probs": probs, "top_k": 40, "top_p": 0.9, "seed": seed},
        ),
    }


def peers(made: Calls) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Torch's own ops on the same tensors."""
    a, b = made["fused_mul_add"][1], made["fused_gemv, bf16"][1]
    yield "torch.add", lambda: torch.add(a["bias"], a["x"], alpha=2.0)
    yield "torch's linear", lambda: torch.nn.functional.linear(b["x"], b["weight"])
    probs = made["sampling"][1]["probs"]
    if len(probs) > 0:
        yield "torch.multinomial", lambda: torch.multinomial(probs, 1)


def launchers(kernels: Kernels, made: Calls) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Both launchers of two kernels alone, without the op around them."""
    a, r = made["fused_mul_add"][1], made["rotary_embedding"][1]
    x, device = a["x"], a["x"].device
    values: dict[str, tuple[Any, ...]] = {
        "fused_mul_add": (x, a["bias"], None, torch.empty_like(x), 2.0),
        "rotary_embedding": (
            *(r["positions"], r["query"], r["key"], r["cos_sin_cache"]),
            *(None, 0, 1),
        ),
    }
    for op, given in values.items():
        for fast, way in ((False, "ctypes"), (True, "compiled")):
            run = kernels.library(device).launcher(
                op, kernels.device_type, kernels.stream_of, fast=fast
            )
            yield f"{op}, launcher in {way}", lambda run=run, given=given: run(*given)


def whole(backend: str, made: Calls) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every op, and every op planned."""
    for label, (name, given) in made.items():
        op = kernelhub.op(name)
        with kernelhub.use(backend):
            plan = op.plan(**given)
        free = {n: value for n, value in given.items() if not op.spec.param(n).fixed}
        for suffix, run, values in (("", op.on(backend), given), (", plan", plan, free)):
            args, rest = _by_position(run, values)
            yield f"{label}{suffix}", lambda f=run, a=args, k=rest: f(*a, **k)


def _by_position(run: Callable[..., Any], given: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments as a caller writes them: by position as far as that goes, then by name."""
    rest, args = dict(given), []
    for name, p in inspect.signature(run).parameters.items():
        if name not in rest or p.kind is p.KEYWORD_ONLY:
            break
        args.append(rest.pop(name))
    return args, rest


def variants(backend: str) -> dict[str, Callable[[], Any]]:
    kernels = registry.backends()[backend].kernels
    device = torch.device(kernels.device_type, 0) if backend != "simt" else torch.device("cpu")
    no_launch = Backend(
        "no_launch", kernels.implementations(), (kernels.device_type,), automatic=False
    )
    registry.add_backend(no_launch)
    found: dict[str, Callable[[], Any]] = {}

    def add(what: str, rows: Iterator[tuple[str, Callable[[], Any]]]) -> None:
        for label, call in rows:
            found[f"{what}: {label}"] = call
            for _ in range(3):
                call()

    one, none = calls(device, 1), calls(device, 0)
    nothing = library._address(NOTHING)
    with mock.patch.object(library, "_address", lambda function: nothing):
        add("no launch", whole("no_launch", one))
    for what, made in (("one token", one), ("empty", none)):
        add(what, launchers(kernels, made))
        add(what, whole(backend, made))
        add(what, peers(made))
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
    parser.add_argument("--only", default="", help="variants whose name has this text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    plugins.load()
    with torch.no_grad():
        found = {name: call for name, call in variants(given.backend).items() if given.only in name}
        times = measure(found, registry.backends()[given.backend].kernels.device_type)
    device = torch.cuda.get_device_name(0) if given.backend == "cuda" else platform.processor()
    for name, us in times.items():
        print(f"{us:8.2f} us  {name}")
    if library.why_not_fast():
        print("no compiled launcher:", "; ".join(library.why_not_fast()))
    if given.json:
        facts = {
            **provenance.facts(),
            "device": device or platform.machine(),
            "microseconds": times,
        }
        given.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
