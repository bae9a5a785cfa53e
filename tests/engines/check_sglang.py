"""The adapter against SGLang's own classes, plug-in loader and hooks. On the CPU.

`tests/test_engines.py` runs it where SGLang is installed; hooks stay, so in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernelhub
from kernelhub.integrations import engines, sglang

pytest.importorskip("sglang.srt.plugins", reason="SGLang cannot be imported", exc_type=ImportError)

from sglang.srt import plugins
from sglang.srt.layers.dual_gemm import DualGemm
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding import base, mrope
from sglang.srt.layers.sampler import Sampler
from sglang.srt.models.llama import LlamaMLP
from sglang.srt.models.qwen2 import Qwen2MLP
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_context, get_parallel

ENTRY = importlib.metadata.EntryPoint(
    "kernelhub", "kernelhub.integrations.sglang:register", plugins.GENERAL_PLUGINS_GROUP
)
METHODS = (
    (base.RotaryEmbedding, "forward"),
    (UnquantizedLinearMethod, "apply"),
    (DualGemm, "can_run"),
    (DualGemm, "__call__"),
    (Sampler, "_sample_from_probs"),
)


def load(monkeypatch: pytest.MonkeyPatch, ops: str) -> None:
    """SGLang's own loader, which finds kernelhub's entry point alone."""
    monkeypatch.setenv(engines.VARIABLE, ops)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [ENTRY])
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()


@pytest.fixture(scope="session", autouse=True)
def loaded() -> Iterator[dict[str, Any]]:
    """Inert without the variable; then with the hooks, for good. Gives the stock methods."""
    before = {f"{c.__name__}.{name}": getattr(c, name) for c, name in METHODS}
    patch = pytest.MonkeyPatch()
    patch.setattr(base, "_is_cpu", True)  # else its CUDA fallback is looked for
    config = get_context().override_server_args(model_path="dummy")
    with patch.context() as inside:
        load(inside, "")
        assert not HookRegistry._hooks
        assert before == {f"{c.__name__}.{name}": getattr(c, name) for c, name in METHODS}
        load(inside, "*")
    config.install()
    with get_parallel().override(tp_size=1, tp_rank=0, tp_group=None):
        yield before
    config.restore()
    patch.undo()


def rows(census: engines.counting.Census) -> list[tuple[str, str, str]]:
    return [(row.op, row.backend, row.why) for row in census.rows]


def test_every_hook_is_applied(loaded: dict[str, Any]) -> None:
    assert len(HookRegistry._patched) == sum(len(hooks) for hooks in sglang.HOOKS.values()) == 5
    for cls, name in METHODS:
        assert getattr(cls, name).__wrapped__ is loaded[f"{cls.__name__}.{name}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("neox", "rotary_dim"), [(True, 32), (False, 32), (True, 16)])
def test_rotary_embedding(
    neox: bool, rotary_dim: int, dtype: torch.dtype, loaded: dict[str, Any],
    census: engines.counting.Census,
) -> None:  # fmt: skip
    module = base.RotaryEmbedding(32, rotary_dim, 64, 10000, neox, dtype)
    positions = torch.tensor([3, 0, 63, 7, 7])
    query, key = torch.randn(5, 4 * 32).to(dtype), torch.randn(5, 32).to(dtype)
    own = loaded["RotaryEmbedding.forward"](module, positions, query.clone(), key.clone())
    got = module(positions, query, key)
    assert got[0] is query  # in place, as SGLang's kernels are
    for expected, y in zip(own, got, strict=True):
        torch.testing.assert_close(
            y, expected, rtol=0.01 if dtype.itemsize == 2 else 1e-5, atol=0.02
        )
    assert rows(census) == [("rotary_embedding", "reference", "default ranking")]


def test_rotary_embedding_falls_through(census: engines.counting.Census) -> None:
    module = base.RotaryEmbedding(32, 32, 64, 10000, True, torch.float32)
    positions, query, key = torch.arange(3), torch.randn(3, 64), torch.randn(3, 32)
    own = module.forward_native(positions, query, key)
    module.enter_torch_compile(3)
    assert torch.equal(module(positions, query, key)[0], own[0])
    module.leave_torch_compile()
    wide = query.double()  # a dtype that the op has not
    assert torch.equal(
        module(positions, wide, key.double())[0], module.forward_native(positions, wide, key)[0]
    )
    sections = mrope.MRotaryEmbedding(
        32, 32, 64, 10000, True, torch.float32, mrope_section=[4, 6, 6]
    )
    three = positions.expand(3, -1).contiguous()
    own = sections.forward_native(three, query.clone(), key.clone())
    assert torch.equal(sections(three, query, key)[0], own[0])
    assert {(row.backend, row.why.split(":")[0]) for row in census.rows} == {
        ("stock", "the engine asks for its native forward"),
        ("stock", "argument 'query'"),
        ("stock", "MRotaryEmbedding has a forward of its own"),
    }


def plain_layer(dtype: torch.dtype) -> tuple[Any, Any]:
    method, layer = UnquantizedLinearMethod(), torch.nn.Module()
    method.create_weights(layer, 32, [48], 32, 48, dtype)
    layer.weight.data.normal_()
    return method, layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear(
    dtype: torch.dtype, loaded: dict[str, Any], census: engines.counting.Census
) -> None:
    method, layer = plain_layer(dtype)
    bias = torch.randn(48).to(dtype)
    for count, backend in ((16, "reference"), (17, "stock")):
        x = torch.randn(count, 32).to(dtype)
        own = loaded["UnquantizedLinearMethod.apply"](method, layer, x, bias)
        torch.testing.assert_close(method.apply(layer, x, bias), own, rtol=0.02, atol=0.05)
        assert census.count("fused_gemv", backend) == 1
    x = torch.randn(2, 32).to(dtype)
    expected = kernelhub.ops.fused_gemv(x, layer.weight)
    assert torch.equal(method.apply(layer, x), expected)


def test_linear_falls_through(census: engines.counting.Census) -> None:
    method, layer = plain_layer(torch.float64)
    x = torch.randn(2, 32, dtype=torch.float64)
    assert torch.equal(method.apply(layer, x), x @ layer.weight.T)
    (row,) = census.rows
    assert row.backend == "stock"
    assert row.why.startswith("argument 'x': expected")


@pytest.mark.parametrize("kind", [LlamaMLP, Qwen2MLP])
def test_mlp(kind: Any, census: engines.counting.Census, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    mlp = kind(32, 64, "silu")
    for p in mlp.parameters():
        p.data.normal_()
    assert isinstance(mlp.dual_gemm, DualGemm)

    def right(x: Tensor) -> Tensor:
        gate, up = (x @ mlp.gate_up_proj.weight.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.weight.T

    for count in (3, 17):
        x = torch.randn(count, 32)
        torch.testing.assert_close(mlp(x), right(x), rtol=1e-4, atol=1e-3)
    assert [(r.place, r.backend, r.count) for r in census.rows] == [
        ("MLP", "reference", 1),
        ("MLP", "stock", 1),
        ("linear", "reference", 1),  # down
        ("linear", "stock", 2),  # gate-up and down
    ]


def info(**given: Any) -> SimpleNamespace:
    batch = {"sampling_mask_batch_indices": None, "sampling_seed": None, "max_top_k": None}
    batch |= {f"need_{n}_sampling": n in given for n in ("top_k", "top_p", "min_p")}
    return SimpleNamespace(**batch, **{f"{n}s": t for n, t in given.items()})


def test_sampling(census: engines.counting.Census) -> None:
    sampler: Any = Sampler.__new__(Sampler)
    g = torch.Generator().manual_seed(0)
    probs = torch.softmax(torch.randn(256, 96, generator=g), -1)
    positions, seeds = torch.arange(256), torch.arange(256) * 7
    batch = info(
        top_k=torch.tensor([40, 1, 1 << 30, 3], dtype=torch.int32).repeat(64),
        top_p=torch.tensor([0.6, 1.0, 0.5, 0.4]).repeat(64),
        min_p=torch.tensor([0.0, 0.0, 0.1, 0.2]).repeat(64),
    )
    batch.sampling_seed = seeds
    tokens, mask = sampler._sample_from_probs(probs, batch, positions, False)
    op = kernelhub.ops.top_k_top_p_sampling_from_probs

    def drawn(order: str, offset: Tensor, least: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"filter_apply_order": order, "seed": seeds, "offset": offset}
        made: Tensor = op(probs, batch.top_ks, batch.top_ps, min_p=least, **options)
        return made

    assert mask is None
    assert torch.equal(tokens, drawn("joint", positions, batch.min_ps))
    for other in (
        drawn("top_k_first", positions, batch.min_ps),
        drawn("joint", positions * 0, batch.min_ps),
        drawn("joint", positions, None),
    ):
        assert not torch.equal(tokens, other)
    assert torch.equal(tokens[1::4], probs[1::4].argmax(-1))
    later, _ = sampler._sample_from_probs(probs, info(), positions, True)
    assert later.shape == (256,)
    assert len(set(later.tolist())) > 4
    assert rows(census) == [("top_k_top_p_sampling_from_probs", "reference", "default ranking")]
    batch = info()
    batch.sampling_mask_batch_indices = torch.tensor([0])
    tokens, mask = sampler._sample_from_probs(probs, batch, positions, True)
    assert mask is not None
    assert tokens.shape == (256,)
    assert census.count(op.spec.name, "stock") == 1


def test_it_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_told", set())
    method, layer = plain_layer(torch.float32)
    with caplog.at_level(logging.WARNING, "kernelhub"):
        for _ in range(3):
            method.apply(layer, torch.randn(20, 32))
    assert [r.getMessage() for r in caplog.records] == [
        "fused_gemv: the engine's own code runs linear (more than 16 rows; said once)"
    ]
