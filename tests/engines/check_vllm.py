"""The adapter against vLLM's own classes and plug-in loader. On the CPU.

`tests/test_engines.py` runs it where vLLM is installed: classes that are registered stay, so in a
process of its own.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kernelhub
from kernelhub.integrations import engines

pytest.importorskip("vllm.plugins", reason="vLLM cannot be imported", exc_type=ImportError)

from vllm import plugins
from vllm.config import CompilationConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import linear, rotary_embedding

ENTRY = importlib.metadata.EntryPoint(
    "kernelhub", "kernelhub.integrations.vllm:register", plugins.DEFAULT_PLUGINS_GROUP
)
STOCK = {
    name: vars(module)[name]
    for module, names in (
        (rotary_embedding, ("RotaryEmbedding", "Llama3RotaryEmbedding", "MRotaryEmbedding")),
        (linear, ("ReplicatedLinear", "QKVParallelLinear", "RowParallelLinear")),
    )
    for name in names
}


def load(monkeypatch: pytest.MonkeyPatch, ops: str) -> None:
    """vLLM's own loader, which finds kernelhub's entry point alone."""
    monkeypatch.setenv(engines.VARIABLE, ops)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [ENTRY])
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()


@pytest.fixture(scope="session", autouse=True)
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank; inert without the variable, then registered for good, twice."""
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        compilation_config=CompilationConfig(custom_ops=["none"]),
    )
    rendezvous = Path(tmp_path_factory.mktemp("vllm")) / "rendezvous"
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        with pytest.MonkeyPatch.context() as patch:
            load(patch, "")
            assert not op_registry_oot
            load(patch, "*")
            load(patch, "*")
        yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def test_what_is_registered() -> None:
    rotary = {n for n in op_registry_oot if n.endswith("RotaryEmbedding")}
    assert {"RotaryEmbedding", "Llama3RotaryEmbedding", "YaRNScalingRotaryEmbedding"} <= rotary
    assert not {"MRotaryEmbedding", "DeepseekScalingRotaryEmbedding"} & rotary
    assert sum(n.endswith("Linear") for n in op_registry_oot) == 5
    assert op_registry_oot["RotaryEmbedding"].name == "rotary_embedding"  # for `custom_ops`


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("neox", "rotary_dim"), [(True, 32), (False, 32), (True, 16)])
def test_rotary_embedding(
    neox: bool, rotary_dim: int, dtype: torch.dtype, census: engines.counting.Census
) -> None:
    module = STOCK["RotaryEmbedding"](32, rotary_dim, 64, 10000.0, neox, dtype)
    positions = torch.tensor([3, 0, 63, 7, 7])
    query, key = torch.randn(5, 4 * 32).to(dtype), torch.randn(5, 32).to(dtype)
    own = module.forward_native(positions, query.clone(), key.clone())
    got = module(positions, query, key)
    assert got[0] is query  # in place, as vLLM's kernels are
    for expected, y in zip(own, got, strict=True):
        torch.testing.assert_close(
            y, expected, rtol=0.01 if dtype.itemsize == 2 else 1e-5, atol=0.02
        )
    alone = query.clone()
    own = module.forward_native(positions, alone.clone(), None)
    torch.testing.assert_close(module(positions, alone)[0], own[0], rtol=0.01, atol=0.02)
    assert census.count("rotary_embedding", "reference") == 2


def test_rotary_embedding_compiled() -> None:
    module = STOCK["RotaryEmbedding"](32, 32, 64, 10000.0, True, torch.float32)
    positions, qkv = torch.arange(5), torch.randn(5, 6 * 32)

    def attention(qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = qkv.split([4 * 32, 32, 32], -1)  # views, written in place
        query, key = module(positions, query, key)
        return torch.cat([query * 2, key, value], -1)

    expected = attention(qkv.clone())
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv.clone()), expected)


def test_rotary_embedding_falls_through(census: engines.counting.Census) -> None:
    module = STOCK["RotaryEmbedding"](32, 32, 64, 10000.0, True, torch.float32)
    positions = torch.arange(3)
    query, key = torch.randn(3, 64).double(), torch.randn(3, 32).double()
    own = module.forward_native(positions, query, key)
    assert torch.equal(module(positions, query, key)[0], own[0])
    (row,) = census.rows
    assert row.backend == "stock"
    assert row.why.startswith("argument 'query': expected")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ReplicatedLinear", "QKVParallelLinear", "RowParallelLinear"])
def test_linear(name: str, dtype: torch.dtype, census: engines.counting.Census) -> None:
    sizes = (32, 16, 4, 2) if name == "QKVParallelLinear" else (32, 48)
    layer = STOCK[name](*sizes, bias=True, params_dtype=dtype)
    assert type(layer) is op_registry_oot[name]
    for p in layer.parameters():
        p.data.normal_()
    x = torch.randn(16, 32).to(dtype)
    y, rest = layer(x)
    assert rest is None
    assert torch.equal(y, kernelhub.ops.fused_gemv(x, layer.weight, bias=layer.bias))
    x = torch.randn(17, 32).to(dtype)
    assert torch.equal(layer(x)[0], torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert [(r.backend, r.why, r.count) for r in census.rows] == [
        ("reference", "default ranking", 1),
        ("stock", "more than 16 rows", 1),
    ]


def test_a_packed_weight_and_a_compiled_layer_fall_through(
    census: engines.counting.Census,
) -> None:
    layer = STOCK["ReplicatedLinear"](32, 48, bias=False, params_dtype=torch.float32)
    layer.weight.data.normal_()
    x = torch.randn(2, 32)
    expected = x @ layer.weight.T
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    assert not census.rows
    layer.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError):  # the engine's own code, which has packed nothing here
        layer(x)
    (row,) = census.rows
    assert (row.backend, row.why) == ("stock", "the engine has packed the weight")
