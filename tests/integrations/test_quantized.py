"""Quantised models: what becomes of each layer, what they say, saved and loaded bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import kernelhub
from kernelhub import quantize as quantization
from kernelhub.errors import ArgumentError
from kernelhub.integrations.transformers import (
    Census,
    accelerate,
    load_quantized,
    quantize,
    save_quantized,
)
from tests.integrations.models import FAMILIES, make, say

SCHEMES = ("int4", "fp8")
BF16 = torch.bfloat16


def rounded(weight: Tensor, scheme: str) -> Tensor:
    """What a quantised weight stands for, in fp32, by the plain way there and back."""
    if scheme == "fp8":
        return quantization.dequantize_fp8(*quantization.quantize_fp8(weight))
    group = next(g for g in (128, 64, 32) if weight.shape[-1] % g == 0)
    return quantization.dequantize_int4(*quantization.quantize_int4(weight, group))


def stock_of_rounded_weights(family: str, scheme: str) -> Any:
    """The family's model in fp32 with the weights that quantisation leaves: no op is in it."""
    model = make(family, BF16).float()
    for name, module in model.named_modules():
        if name == "lm_head":
            continue
        if hasattr(module, "gate_proj"):  # gate and up share blocks, so they are rounded together
            both = rounded(
                torch.cat([module.gate_proj.weight, module.up_proj.weight]).to(BF16), scheme
            )
            module.gate_proj.weight.data, module.up_proj.weight.data = both.chunk(2)
        elif isinstance(module, nn.Linear) and "gate_proj" not in name and "up_proj" not in name:
            module.weight.data = rounded(module.weight.data.to(BF16), scheme)
        elif hasattr(module, "gate_up_proj"):
            for p in (module.gate_up_proj, module.down_proj):
                p.data = rounded(p.data.to(BF16), scheme)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_rounded_weights(family: str, scheme: str) -> None:
    """Held to a stock model in fp32 whose weights are what the codes stand for."""
    model = make(family, BF16)
    report = quantize(model, scheme)
    assert {layer.why for layer in report.stock} <= {
        "the output layer keeps its weights",
        "no op looks up embeddings",
        "no op normalises its input alone",
        "its product is a part of the routing, of no nn.Linear",
    }
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    prompt = torch.tensor([[5, 17, 3, 40]])
    truth = stock_of_rounded_weights(family, scheme)
    with torch.no_grad():
        expected, got = truth(prompt).logits, model(prompt).logits
        with kernelhub.use("simt"), accelerate(model):
            simt = model(prompt).logits
    for logits in (got, simt):
        assert (logits - expected).abs().max() < 0.04 * expected.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_saved_and_loaded(family: str, scheme: str, tmp_path: Path) -> None:
    model = make(family, BF16, tie_word_embeddings=family == "qwen3_moe")
    quantize(model, scheme)
    said = say(model)
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model")
    assert torch.equal(say(loaded).logits, said.logits)
    assert {n: (t.dtype, t.shape) for n, t in loaded.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in model.state_dict().items()
    }
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert not loaded.training
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (family == "qwen3_moe")
    save_quantized(loaded, tmp_path / "again")
    files = [
        (tmp_path / name / "quantized.safetensors").read_bytes() for name in ("model", "again")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_the_attention_is_kept(attention: str, tmp_path: Path) -> None:
    model = make("llama", BF16)
    quantize(model, "int4")
    chosen = "sdpa" if attention == "flash_attention_2" else attention
    model.set_attn_implementation(chosen)
    said = say(model)
    model.config._attn_implementation = attention
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    assert loaded.config._attn_implementation == chosen
    assert torch.equal(say(loaded).logits, said.logits)


def test_accelerate_counts_quantised_layers_and_leaves_them() -> None:
    model = make("qwen3_moe", BF16)
    quantize(model, "int4")
    said, census = say(model), Census()
    with accelerate(model, census=census) as accelerated:
        inside = say(model)
    assert torch.equal(inside.tokens, said.tokens)
    assert torch.equal(say(model).logits, said.logits)
    assert census.count("fused_gemv") == 8 * (2 * 2 + 2 + 1 + 1)
    assert census.count("fused_moe_gemv") == 8 * 2
    quantised = [layer for layer in accelerated.layers if layer.kind.startswith("Quantized")]
    assert {layer.op for layer in quantised} == {"fused_gemv", "fused_moe_gemv"}
    assert not any(layer.why for layer in quantised)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("head_dim", [128, 32])
def test_projections_of_a_quantised_model(scheme: str, head_dim: int) -> None:
    """One product where blocks of fp8 end with each projection, else three: the same numbers."""
    model = make("qwen3", BF16, head_dim=head_dim)
    quantize(model, scheme)
    said, census = say(model), Census()
    with accelerate(model, census=census):
        inside = say(model)
    assert torch.equal(inside.tokens, said.tokens)
    joined = "query, key and value" in {row.place for row in census.rows}
    assert joined == (scheme == "int4" or head_dim == 128)
    assert inside.error(said) < 0.02


def test_groups() -> None:
    model = make("llama", BF16, intermediate_size=96)
    quantize(model, "int4", group_size=32)
    layer = model.model.layers[0]
    assert layer.mlp.gate_up.weight_scale.shape == (192, 2)
    assert layer.mlp.down.weight_scale.shape == (64, 3)
    model = make("llama", BF16, intermediate_size=100)
    report = quantize(model, "int4", group_size=64)
    reasons = {layer.name: layer.why for layer in report.stock}
    assert reasons["model.layers.1.mlp"] == "K = 100 is no multiple of a group of 64"
    assert reasons["lm_head"] == "the output layer keeps its weights"
    assert reasons["model.layers.1.mlp.down_proj"] == reasons["model.layers.1.mlp"]
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp.down_proj, nn.Linear)
    assert not isinstance(mlp.gate_proj, nn.Linear), "what can be quantised is"
    with torch.no_grad():
        assert model(torch.tensor([[5, 17]])).logits.isfinite().all()


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scheme": ("'int4' or 'fp8'", {}, {"scheme": "int8"}),
    "group_size": ("32, 64 or 128", {}, {"scheme": "int4", "group_size": 48}),
    "group_size of fp8": ("of int4 alone", {}, {"scheme": "fp8", "group_size": 64}),
    "fp32": ("weights of float32, not bf16", {"dtype": torch.float32}, {"scheme": "fp8"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    message, options, arguments = REFUSED[name]
    model = make("qwen2", **{"dtype": BF16, **options})
    stock = say(model)
    with pytest.raises(ArgumentError, match=message):
        quantize(model, **arguments)
    assert torch.equal(say(model).logits, stock.logits), "as it was"


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a model that `quantize` changed"):
        save_quantized(make("llama"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"quantized\.safetensors"):
        load_quantized(tmp_path)
    model = make("llama", BF16)
    quantize(model, "fp8")
    save_quantized(model, tmp_path)
    path = tmp_path / "quantized.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    del tensors["model.norm.weight"]
    tensors["extra"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ArgumentError, match=r"missing \['model.norm.weight'\], unknown \['extra'"):
        load_quantized(tmp_path)
    about = json.loads(metadata["kernelhub"])
    for change in ({"format": 2}, {"model": "os"}, {"model": "GPT2LMHeadModel"}):
        other = {"kernelhub": json.dumps({**about, **change})}
        safetensors.torch.save_file(tensors, path, other)
        with pytest.raises(ArgumentError, match="load_quantized: argument 'directory'"):
            load_quantized(tmp_path)
