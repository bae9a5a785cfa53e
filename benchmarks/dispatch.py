"""What a call through kernelhub costs on the host, beside torch's own ways to call an op.

Every variant ends in the same Python function that does nothing, with the parameters of
`fused_gemv`. Rows ending in "adds" are differences within a round, in microseconds.

    python benchmarks/dispatch.py [--json PATH]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved, save

from kernelhub import function, registry
from kernelhub.backend import Backend, Implementation
from kernelhub.spec import Cost, OpSpec, Param, Traits

NOTHING = torch.empty(0)


def bench_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Does nothing."""
    return NOTHING


def spec_named(name: str) -> OpSpec:
    prototype = _copy(bench_op, name)
    return OpSpec(
        prototype=prototype,
        params=(
            Param("x", dtypes=[torch.float32]),
            Param("weight", dtypes=[torch.float32], fixed=True),
            Param("x_scale", dtypes=[torch.float32], optional=True),
            Param("weight_scale", dtypes=[torch.float32], optional=True, fixed=True),
            Param("activation", "attribute", types=(str,), optional=True, fixed=True),
            Param("eps", "attribute", types=(float,), fixed=True),
            Param("out", "output", dtypes=[torch.float32], optional=True),
        ),
        check=lambda args: None,
        outputs=lambda args: (),
        reference=prototype,
        oracle=lambda args, chain: (),
        cases=lambda: iter(()),
        cost=lambda args: Cost(0, 0, 0),
        device_param="x",
        reference_traits=Traits(differentiable=True),
    )


def _copy(f: Callable[..., Any], name: str) -> Callable[..., Any]:
    import types

    copy = types.FunctionType(f.__code__, f.__globals__, name, f.__defaults__, f.__closure__)
    copy.__kwdefaults__ = f.__kwdefaults__
    copy.__annotations__ = f.__annotations__
    copy.__doc__ = f.__doc__
    return copy


def _torch_variants(x: torch.Tensor, w: torch.Tensor) -> dict[str, Callable[[], Any]]:
    library = torch.library.Library("kernelhub_bench", "DEF")
    schema = "(Tensor x, Tensor weight, Tensor? x_scale=None, Tensor? weight_scale=None) -> Tensor"
    library.define("by_library" + schema)
    library.impl("by_library", lambda x, w, xs=None, ws=None: NOTHING, "CPU")
    _torch_variants.keep = library  # type: ignore[attr-defined]

    @torch.library.custom_op("kernelhub_bench::by_custom_op", mutates_args=())
    def by_custom_op(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.empty(0)

    by_library = torch.ops.kernelhub_bench.by_library.default
    variants: dict[str, Callable[[], Any]] = {
        "Library.impl in Python": lambda: by_library(x, w),
        "torch.library.custom_op": lambda: by_custom_op(x, w),
    }
    try:
        from torch.utils.cpp_extension import load_inline

        load_inline(
            "kernelhub_bench_cpp",
            cpp_sources="""
            #include <torch/library.h>
            #include <ATen/ATen.h>
            static at::Tensor nothing;
            at::Tensor by_cpp(const at::Tensor& x, const at::Tensor& w,
                std::optional<at::Tensor> xs, std::optional<at::Tensor> ws) { return nothing; }
            TORCH_LIBRARY(kernelhub_bench_cpp, m) {
                nothing = at::empty({0});
                m.def("by_cpp(Tensor x, Tensor weight, Tensor? a=None, Tensor? b=None) -> Tensor");
            }
            TORCH_LIBRARY_IMPL(kernelhub_bench_cpp, CPU, m) { m.impl("by_cpp", by_cpp); }
            """,
            is_python_module=False,
            verbose=False,
        )
        by_cpp = torch.ops.kernelhub_bench_cpp.by_cpp.default
        variants["C++ torch op"] = lambda: by_cpp(x, w)
    except (RuntimeError, OSError, ImportError) as error:
        print(f"no C++ torch op: {str(error).splitlines()[0]}", file=sys.stderr)
    return variants


def calls() -> list[dict[str, Any]]:
    """Microseconds per call and above the implementation."""
    op = function.add(spec_named("bench_op"))
    x, w = torch.zeros(1, 8), torch.zeros(8, 8)
    implementation, spec = op.reference, op.spec
    plan = op.plan(x, w)
    variants: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,  # what the timing loop itself takes
        "implementation": lambda: implementation(x, w),
        "argument checks": lambda: spec.validate(spec.bind(x, w)),
        "kernelhub op": lambda: op(x, w),
        "kernelhub plan": lambda: plan(x),
        **_torch_variants(x, w),
    }
    times = interleaved(variants, rounds=41)
    base = times["implementation"]
    rows = []
    for name, seconds in times.items():
        adds = [a - b for a, b in zip(seconds, base, strict=True)]
        rows.append(_row(name, seconds, adds))
    dispatch = [
        op_s - impl_s - (checks_s - nothing_s)
        for op_s, impl_s, checks_s, nothing_s in zip(
            times["kernelhub op"], base, times["argument checks"], times["nothing"], strict=True
        )
    ]
    rows.append(_row("kernelhub dispatch (op less checks)", times["kernelhub op"], dispatch))
    function.remove("bench_op")
    return rows


def _row(name: str, seconds: list[float], adds: list[float]) -> dict[str, Any]:
    return {
        "variant": name,
        "us": round(statistics.median(seconds) * 1e6, 3),
        "adds_us": round(statistics.median(adds) * 1e6, 3),
    }


def flatness() -> list[dict[str, Any]]:
    """The same call with 1 and with 1,000 ops and backends registered, interleaved."""
    x, w = torch.zeros(1, 8), torch.zeros(8, 8)
    op = function.add(spec_named("bench_first"))
    few = interleaved({"op": lambda: op(x, w)}, rounds=41)["op"]
    names = [f"bench_{i}" for i in range(1000)]
    for name in names:
        function.add(spec_named(name))
    for i in range(1000):
        target = _copy(bench_op, "bench_first")
        made = Implementation("bench_first", target, device_types=(f"kind{i}",))
        registry.add_backend(Backend(f"bench{i}", (made,)))
    op(x, w)
    many = interleaved({"op": lambda: op(x, w)}, rounds=41)["op"]
    for i in range(1000):
        registry.remove_backend(f"bench{i}")
    for name in ["bench_first", *names]:
        function.remove(name)
    return [
        {"registered": 1, "us": round(statistics.median(few) * 1e6, 3)},
        {"registered": 1000, "us": round(statistics.median(many) * 1e6, 3)},
    ]


def import_ms(rounds: int = 9) -> dict[str, float]:
    """Milliseconds to import kernelhub after torch in fresh processes, from compiled bytecode."""
    code = (
        "import time, torch; start = time.perf_counter(); import kernelhub; "
        "print((time.perf_counter() - start) * 1e3)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def once() -> float:
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return float(run.stdout)

    once()  # writes the bytecode
    runs = [once() for _ in range(rounds)]
    return {"min_ms": round(min(runs), 1), "median_ms": round(statistics.median(runs), 1)}


def real_checks() -> list[dict[str, Any]]:
    """Argument checks of the shipped ops on their first typical case, in microseconds."""
    rows = []
    for name, spec in registry.specs().items():
        case = next(c for c in spec.cases() if c.kind == "typical")
        arguments = case.arguments()
        args = spec.bind(**arguments)
        start = time.perf_counter()
        for _ in range(2000):
            spec.validate(args)
        rows.append({"op": name, "checks_us": round((time.perf_counter() - start) / 2000 * 1e6, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {
        "calls": calls(),
        "checks": real_checks(),
        "registered": flatness(),
        "import": import_ms(),
    }
    console = Console()
    for title, rows in results.items():
        rows = rows if isinstance(rows, list) else [rows]
        table = Table(title=title)
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
    save(options.json, results)


if __name__ == "__main__":
    main()
