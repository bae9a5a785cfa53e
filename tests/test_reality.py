"""Tensors of other classes, tracers, forks and other ways in which a call is not the usual one."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import kernelhub
from kernelhub import ops, quantize
from kernelhub.backends.native import build
from kernelhub.backends.native.library import Library
from kernelhub.errors import ArgumentError, PolicyError


class Plain(torch.Tensor):
    """Ordinary memory under another name."""


class Weight(nn.Parameter):
    """As serving engines have them."""


def test_what_overlaps_is_refused_in_subclasses_too() -> None:
    buffer = torch.randn(16, 8)
    weight = Weight(buffer, requires_grad=False)
    x = torch.randn(2, 8)
    with pytest.raises(ArgumentError, match="'out'"):
        ops.fused_gemv(x, weight, out=buffer[14:].view(1, 16).expand(2, 16)[:, :16])
    with pytest.raises(ArgumentError, match="'out'"):
        ops.fused_gemv(x[:1], weight, out=buffer[14:].view(1, 16))
    base = torch.arange(1.0, 33.0)
    with pytest.raises(ArgumentError, match="'out'"):
        ops.fused_mul_add(
            base[:16].view(4, 4).as_subclass(Plain),
            torch.zeros(4, 4),
            2.0,
            out=base[4:20].view(4, 4),
        )
    positions, cache = torch.zeros(3, dtype=torch.int64), torch.randn(4, 8)
    one = torch.randn(1, 8).expand(3, 8).as_subclass(Plain)
    with pytest.raises(ArgumentError, match="'query'"):
        ops.rotary_embedding(positions, one, None, 8, cache)
    both = torch.randn(3, 8).as_subclass(Plain)
    with pytest.raises(ArgumentError, match=r"'(key|query)'"):
        ops.rotary_embedding(positions, both, both, 8, cache)


@pytest.mark.parametrize("backend", ["reference", "simt"])
def test_inference_tensors_are_written_to_in_inference_mode_alone(backend: str) -> None:
    """As torch has it, but refused before anything is written."""
    with torch.inference_mode():
        out, query, key = torch.zeros(3), torch.ones(1, 8), torch.ones(1, 8)
    mul_add = ops.fused_mul_add.on(backend)
    rotate = ops.rotary_embedding.on(backend)
    positions, cache, x = torch.ones(1, dtype=torch.int64), torch.full((2, 8), 0.5), torch.ones(3)

    def calls(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> list[Any]:
        return [
            lambda: mul_add(x, x, 2.0, out=out),
            lambda: rotate(positions, query, torch.ones(1, 8), 8, cache),
            lambda: rotate(positions, torch.ones(1, 8), key, 8, cache),
        ]

    for name, call, alike in zip(
        ("out", "query", "key"),
        calls(out, query, key),
        calls(out.clone(), query.clone(), key.clone()),
        strict=True,
    ):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                alike()  # a known call from the third on
                alike()
                with pytest.raises(ArgumentError, match=f"argument '{name}': .*clone it, or call"):
                    call()
        alike()
    assert (out.tolist(), query.tolist(), key.tolist()) == ([0.0] * 3, [[1.0] * 8], [[1.0] * 8])
    with torch.inference_mode():
        for call in calls(out, query, key) * 2:
            call()
    assert out.tolist() == [3.0] * 3
    assert 1.0 not in query.tolist()[0] + key.tolist()[0]


@pytest.mark.parametrize("tracer", ["make_fx", "jit.trace"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_a_plan_is_seen_by_tracers(tracer: str) -> None:
    x, weight = torch.randn(2, 8), torch.randn(16, 8)
    with kernelhub.use("simt"):
        plan = ops.fused_gemv.plan(x, weight)
        trace: Any = make_fx if tracer == "make_fx" else lambda f: lambda a: torch.jit.trace(f, a)
        program = trace(lambda a: plan(a) + 0)(x)
        assert torch.equal(program(2 * x), plan(2 * x))


def test_the_gradient_of_a_table_in_a_compiled_graph() -> None:
    positions, weights = torch.tensor([0, 3, 1]), torch.randn(3, 8)
    query, table = torch.randn(3, 8), torch.randn(4, 8)

    def gradient(rotate: Any) -> torch.Tensor:
        cache = table.clone().requires_grad_()
        rotate(query.clone(), cache).backward()
        assert cache.grad is not None
        return cache.grad

    def rotate(rotated: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        ops.rotary_embedding(positions, rotated, None, 8, cache)
        return (rotated * weights).sum()

    compiled = torch.compile(rotate, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(rotate))


def test_quantised_parameters_have_no_graph() -> None:
    layer = nn.Linear(64, 16)
    made = (
        *quantize.quantize_int4(layer.weight, 32, zero_point=True),
        *quantize.quantize_fp8(layer.weight, "channel"),
        *quantize.quantize_fp8_activation(layer.weight),
    )
    assert [t for t in made if t is not None and (t.requires_grad or t.grad_fn is not None)] == []
    kept = weakref.ref(layer.weight)
    del layer
    assert kept() is None


def test_a_child_forked_amid_a_build_can_build(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        raise build.BuildError("not now")

    platform: Any = object()
    monkeypatch.setattr(build, "_found_or_built", slow)

    def first() -> None:
        with pytest.raises(build.BuildError):
            build.ensure(platform, "arch")

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(30)
    child = os.fork()
    if child == 0:
        build._found_or_built = lambda *given: os._exit(0)  # type: ignore[assignment]
        try:
            threading.Timer(20, lambda: os._exit(3)).start()  # else it waits for ever
            build.ensure(platform, "arch")
        finally:
            os._exit(2)
    go_on.set()
    thread.join()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_use_does_not_decorate_what_runs_after_the_call() -> None:
    async def coroutine() -> None: ...

    def generator() -> Any:
        yield

    async def both() -> Any:
        yield

    for function in (coroutine, generator, both):
        with pytest.raises(PolicyError, match=rf"'simt'.*{function.__name__}.*`with` block"):
            kernelhub.use("simt")(function)

    @kernelhub.use("reference")
    def plain() -> str:
        return str(ops.fused_gemv.explain(torch.ones(1, 8), torch.ones(2, 8)).origin)

    assert plain() == 'use("reference")'


def test_what_only_looks_like_a_tensor_is_described() -> None:
    series = SimpleNamespace(dtype="float64", shape=(3,))
    with pytest.raises(ArgumentError, match=r"argument 'x': .* got \[3\] float64"):
        ops.fused_mul_add(series, torch.ones(3), 1.0)  # type: ignore[arg-type]


def test_on_cuda_calls_through_ctypes_are_queued_on_the_current_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fake(Library):
        def __init__(self) -> None: ...

        def function(self, name: str) -> Any:
            return ctypes.CFUNCTYPE(ctypes.c_int32)(lambda: 0)

    asked: list[Any] = []

    def current(device: Any = None) -> Any:
        asked.append(device)
        return SimpleNamespace(cuda_stream=77)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    launcher: Any = Fake().launcher("fused_mul_add", "cuda", None, fast=False)
    assert launcher._stream_of(1) == 77
    assert asked == [1]
