"""Adapters for serving engines: who asks, what falls through, and the engines' own classes.

`engines/check_*.py` hold the adapters against an engine that is installed; each runs in a process
of its own, for what engines are given stays.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernelhub
from kernelhub.backend import Backend, Implementation
from kernelhub.errors import PolicyError
from kernelhub.integrations import engines, sglang, vllm

ROOT = Path(__file__).parent.parent
X, WEIGHT = torch.ones(2, 8), torch.ones(4, 8)


@pytest.fixture(autouse=True)
def census(monkeypatch: pytest.MonkeyPatch) -> engines.counting.Census:
    counted = engines.counting.Census()
    monkeypatch.setattr(engines, "census", counted)
    monkeypatch.setattr(engines, "_told", set())
    return counted


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_against_the_engine_itself(engine: str) -> None:
    if find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-rs"),
            *("-W", "ignore", f"tests/engines/check_{engine}.py"),  # warnings are the engine's
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    )
    if run.returncode == 5 and "skipped" in run.stdout:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_entry_points_lead_to_a_plugin_that_does_nothing_unasked(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {"sglang": "sglang.srt.plugins", "vllm": "vllm.general_plugins"}[engine]
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf'entry-points\."{group}"\]\nkernelhub = "([\w.]+):(\w+)"', text)
    assert found
    monkeypatch.delenv(engines.VARIABLE, raising=False)
    before = set(sys.modules)
    getattr(importlib.import_module(found[1]), found[2])()
    assert not [name for name in set(sys.modules) - before if name.startswith(engine)]


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("", []),
        ("rotary_embedding", ["rotary_embedding"]),
        (" fused_gemv , rotary_embedding,", ["rotary_embedding", "fused_gemv"]),
        ("fused_*", ["fused_gemv"]),
        ("*", ["rotary_embedding", "fused_gemv"]),
    ],
)
def test_who_asks(text: str, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engines.VARIABLE, text)
    assert engines.chosen("vLLM", vllm.OPS) == taken


def test_an_unknown_op_and_one_without_a_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(engines.VARIABLE, "fused_gemm")
    with pytest.raises(PolicyError, match="KERNELHUB_ENGINE_OPS: no op matches 'fused_gemm'; "):
        engines.chosen("vLLM", vllm.OPS)
    monkeypatch.setenv(engines.VARIABLE, "fused_mul_add,fused_gemv")
    assert engines.chosen("vLLM", vllm.OPS) == ["fused_gemv"]
    assert "vLLM has no place for fused_mul_add: vLLM keeps its own code" in caplog.messages


def test_names_of_ops_exist() -> None:
    for op in (*sglang.HOOKS, *vllm.OPS):
        assert kernelhub.op(op).spec.name == op


def run(why: str = "", x: Any = X, **options: Any) -> Any:
    return engines.run("fused_gemv", "place", lambda: "own", why, x, WEIGHT, **options)


def test_what_runs_and_what_falls_through(
    census: engines.counting.Census, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch.equal(run(), X @ WEIGHT.T)
    assert not census.rows  # calls that are served are not counted unless asked for
    assert run("too many") == "own"
    assert run(x=torch.ones(2, 9)) == run(x=torch.ones(2, 10)) == "own"
    assert run(activation="relu") == "own"
    with kernelhub.use("cuda"):
        assert run() == "own"
    whys = {row.why: row.count for row in census.rows}
    assert all(row.backend == "stock" and row.place == "place" for row in census.rows)
    assert whys.pop("too many") == 1
    refused = next(why for why in whys if why.startswith('use("cuda"); '))
    assert "cuda: runs on cuda; the tensors are on cpu" in refused
    assert whys.pop(refused) == 1
    assert [why.partition(":")[0] for why in whys] == [
        "argument 'activation'",
        "argument 'weight'",
        "argument 'weight'",
    ]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 4  # 'weight' once, with the first shape that came


def test_all_calls_are_counted_where_asked(
    census: engines.counting.Census, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "count_all", True)
    with kernelhub.use("simt"):
        run()
    (row,) = census.rows
    assert (row.op, row.place, row.backend, row.why) == (
        "fused_gemv", "place", "simt", 'use("simt")'
    )  # fmt: skip


def test_an_error_of_a_running_kernel_is_no_refusal(
    add_backend: Any, census: engines.counting.Census
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("inside a kernel")

    add_backend(Backend("toy", (Implementation("fused_gemv", _like(broken)),), priority=50))
    with kernelhub.use("toy"), pytest.raises(RuntimeError, match="inside a kernel"):
        run()
    assert not census.rows


def _like(run: Any) -> Any:
    """A function with the op's signature."""
    run.__signature__ = kernelhub.op("fused_gemv").spec.signature
    return run


def test_under_torch_compile() -> None:
    compiled = torch.compile(lambda x: run(x=x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), X @ WEIGHT.T + 1)
    layer = SimpleNamespace(weight=WEIGHT)

    def linear(x: torch.Tensor) -> Any:
        return engines.linear(lambda: x.sum(), layer, x, None)

    assert torch.compile(linear, fullgraph=True, backend="aot_eager")(X) == X.sum()
    assert torch.equal(linear(X), X @ WEIGHT.T)


@pytest.mark.parametrize(
    ("layer", "x", "why"),
    [
        (SimpleNamespace(weight=WEIGHT), torch.ones(4, 4, 8), ""),
        (SimpleNamespace(weight=WEIGHT), torch.ones(17, 8), "more than 16 rows"),
        (SimpleNamespace(weight=torch.empty(0)), X, "the engine has packed the weight"),
        (SimpleNamespace(weight=WEIGHT), (X, X), "SimpleNamespace of tuple and Tensor"),
        (SimpleNamespace(), X, "SimpleNamespace of Tensor and NoneType"),
    ],
)
def test_which_products_are_gemv(layer: Any, x: Any, why: str) -> None:
    assert engines.why_not_gemv(layer, x) == why
