"""Models whose linear and expert weights are int4 or fp8: made, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import attrs
import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from kernelhub import quantize as quantization
from kernelhub.errors import ArgumentError
from kernelhub.integrations.census import Census, run
from kernelhub.integrations.transformers import families, layers
from kernelhub.integrations.transformers.families import Family, Layer
from kernelhub.integrations.transformers.patches import Patch

Scheme = Literal["int4", "fp8"]

_FILE = "quantized.safetensors"
_FORMAT = 1
_ATTENTION = ("eager", "sdpa")  # implementations that are always there
_DTYPES = (torch.bfloat16, torch.float16)
_GROUPS = (128, 64, 32)


class QuantizedLinear(nn.Module):
    """`activation(x @ dequant(weight).T + bias)` through `fused_gemv`, any number of rows.

    `weight` and `weight_scale` are as `fused_gemv` takes them; x is bf16 or fp16.
    """

    op = "fused_gemv"

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.counted((), x)

    def counted(self, censuses: tuple[Census, ...], x: Tensor) -> Tensor:
        place = "gate-up with SwiGLU" if self.activation == "swiglu" else "linear"
        y: Tensor = run(
            censuses, self.op, place, x, self.weight, weight_scale=self.weight_scale,
            bias=self.bias, activation=self.activation,
        )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return _shapes(self)


class QuantizedMLP(nn.Module):
    """`down(silu(gate) * up)`, gate and up in one weight."""

    def __init__(self, gate_up: QuantizedLinear, down: QuantizedLinear) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate_up(x))
        return y


class QuantizedExperts(nn.Module):
    """The experts of a block through `fused_moe_gemv`, any number of rows."""

    op = "fused_moe_gemv"
    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(
        self, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("gate_up", gate_up)
        self.register_buffer("gate_up_scale", gate_up_scale)
        self.register_buffer("down", down)
        self.register_buffer("down_scale", down_scale)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.counted((), hidden_states, top_k_index, top_k_weights)

    def counted(
        self,
        censuses: tuple[Census, ...],
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        gate_up, down = (self.gate_up, self.gate_up_scale), (self.down, self.down_scale)
        call = (hidden_states, top_k_index, top_k_weights)
        return layers.expert_layers(censuses, *call, gate_up, down)

    def extra_repr(self) -> str:
        return _shapes(self)


QUANTIZED = (QuantizedLinear, QuantizedExperts)


def count(patch: Patch, users: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """A quantised layer inside `accelerate`: it runs through its op anyway, here it is counted."""
    return patch.owner.counted(layers.censuses_of(users), *args, **kwargs)


def _shapes(module: nn.Module) -> str:
    return ", ".join(
        f"{name}={list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for name, t in module.named_buffers()
    )


@attrs.frozen
class Quantized:
    """What became of the layers of a model that `quantize` has changed."""

    scheme: str
    layers: tuple[Layer, ...]

    @property
    def stock(self) -> tuple[Layer, ...]:
        """The layers that keep their weights, each with the reason."""
        return tuple(layer for layer in self.layers if layer.why)


def quantize(model: Any, scheme: Scheme, *, group_size: int | None = None) -> Quantized:
    """Replace the linear and expert weights of a model by quantised ones, in place.

    Args:
        model: a model of one of the families of `accelerate`, bf16 or fp16.
        scheme: "int4" (with a scale for each group along K) or "fp8" (e4m3, blocks of 128 by 128).
        group_size: int4 only: 32, 64 or 128 elements along K for each scale; not given, the largest
            of them that divides K. A layer whose K it does not divide keeps its weights.

    Returns:
        Quantized: every layer that has weights, with the reason where it keeps them. Embeddings,
        norms, routers and the output layer always do.

    Raises:
        ArgumentError: the model is of none of the families, an option is unknown, or no layer can
            be quantised. The model is then as it was.
    """
    family = families.family_of("quantize", model)
    if scheme not in ("int4", "fp8"):
        raise ArgumentError("quantize", "scheme", "'int4' or 'fp8'", scheme)
    if group_size is not None and (scheme != "int4" or group_size not in _GROUPS):
        raise ArgumentError("quantize", "group_size", "32, 64 or 128, of int4 alone", group_size)
    made: dict[str, nn.Module] = {}
    found = tuple(_quantized(model, family, scheme, group_size, made))
    if not made:
        reasons = "; ".join(dict.fromkeys(layer.why for layer in found)) or "no layers"
        raise ArgumentError("quantize", "model", "layers that can be quantised", reasons)
    for name, module in made.items():
        model.set_submodule(name, module.train(model.training))
    return Quantized(scheme, found)


def _quantized(
    model: Any, family: Family, scheme: str, group_size: int | None, made: dict[str, nn.Module]
) -> Iterator[Layer]:
    """Put the replacements into `made`, tell of each layer."""
    inside = set(model.base_model.modules())
    for name, module in model.named_modules():
        kind, cls = family.kind_of(module), type(module).__name__
        if any(name.startswith(f"{done}.") for done in made):
            continue  # a part of what has been replaced
        if kind == "mlp":
            why = families.refusal(family, kind, module) or _mlp_refusal(module, scheme, group_size)
            if not why:
                made[name] = _mlp(module, scheme, group_size)
            yield Layer(name, cls, "fused_gemv", why)
        elif kind == "experts":
            weights = (module.gate_up_proj, module.down_proj)
            why = families.refusal(family, kind, module) or _refusal(scheme, group_size, *weights)
            if not why:
                pairs = [_codes(weight, scheme, group_size) for weight in weights]
                made[name] = QuantizedExperts(*pairs[0], *pairs[1])
            yield Layer(name, cls, "fused_moe_gemv", why)
        elif isinstance(module, nn.Linear):
            why = families.linear_refusal(module) or _refusal(scheme, group_size, module.weight)
            if module not in inside:
                why = "the output layer keeps its weights"
            if not why:
                made[name] = _linear(module, scheme, group_size)
            yield Layer(name, cls, "fused_gemv", why)
        elif module._parameters:
            yield Layer(name, cls, "", families.no_op(module))


def _refusal(scheme: str, group_size: int | None, *weights: Tensor) -> str:
    """Why weights cannot be quantised; empty where they can."""
    for weight in weights:
        if weight.dtype not in _DTYPES:
            return f"weights of {str(weight.dtype).removeprefix('torch.')}, not bf16 or fp16"
        if scheme == "int4" and _group(weight.shape[-1], group_size) is None:
            return f"K = {weight.shape[-1]} is no multiple of a group of {group_size or 32}"
    return ""


def _group(k: int, group_size: int | None) -> int | None:
    return next((g for g in _GROUPS if k % g == 0 and group_size in (None, g)), None)


def _codes(weight: Tensor, scheme: str, group_size: int | None) -> tuple[Tensor, Tensor]:
    weight = weight.detach()
    if scheme == "fp8":
        return quantization.quantize_fp8(weight)
    packed, scale, _ = quantization.quantize_int4(weight, _group(weight.shape[-1], group_size))
    return packed, scale


def _linear(linear: nn.Linear, scheme: str, group_size: int | None) -> QuantizedLinear:
    bias = None if linear.bias is None else linear.bias.detach()
    return QuantizedLinear(*_codes(linear.weight, scheme, group_size), bias)


def _mlp_refusal(mlp: Any, scheme: str, group_size: int | None) -> str:
    if not isinstance(mlp.down_proj, nn.Linear):
        return f"'down_proj' is a {type(mlp.down_proj).__name__}, not an nn.Linear"
    return families.linear_refusal(mlp.down_proj) or _refusal(
        scheme, group_size, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    )


def _mlp(mlp: Any, scheme: str, group_size: int | None) -> QuantizedMLP:
    both = layers.join(mlp.gate_proj, mlp.up_proj)
    bias = None if both["bias"] is None else both["bias"].detach()
    gate_up = QuantizedLinear(*_codes(both["weight"], scheme, group_size), bias, "swiglu")
    return QuantizedMLP(gate_up, _linear(mlp.down_proj, scheme, group_size))


# ---- files -----------------------------------------------------------------------------------


def save_quantized(model: Any, directory: str | Path) -> None:
    """Write a quantised model: its configuration, and its tensors as `quantized.safetensors`.

    Raises:
        ArgumentError: the model has not been quantised.
    """
    kinds = _kinds(model)
    if not kinds:
        raise ArgumentError("save_quantized", "model", "a model that `quantize` changed", model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    about = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "layers": kinds,
        "attention": model.config._attn_implementation,  # its configuration does not say
    }
    safetensors.torch.save_file(
        {name: t.detach().contiguous().cpu() for name, t in _tensors(model)},
        directory / _FILE,
        metadata={"kernelhub": json.dumps(about)},
    )


def load_quantized(directory: str | Path) -> Any:
    """Read a model that `save_quantized` wrote, to the CPU, for evaluation.

    Every tensor comes from the file, those that transformers computes anew among them, and the
    attention is the one that was chosen ("eager" or "sdpa"; for others than torch's own,
    transformers chooses), so the model answers bit for bit as the one that was saved.

    Raises:
        FileNotFoundError: there is no such model.
        ArgumentError: the file is of another kind, or its tensors are not those of the model.
    """
    directory = Path(directory)
    path = directory / _FILE
    if not path.exists():
        raise FileNotFoundError(f"load_quantized: there is no {path}")
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("kernelhub", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("format") != _FORMAT:
        expected = f"a file of save_quantized, format {_FORMAT}"
        raise ArgumentError("load_quantized", "directory", expected, str(about.get("format")))
    model = _empty(str(about.get("model")), directory, about.get("attention"))
    for name, kind in about["layers"].items():
        model.set_submodule(name, _from_tensors(kind, name, tensors))
    _fill(model, tensors)
    model.tie_weights()
    return model.eval()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors, each once: parameters, and buffers also where a state_dict leaves them out."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _kinds(model: nn.Module) -> dict[str, str]:
    """What `_from_tensors` makes each quantised layer from; an MLP stands for its parts."""
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            kinds[name] = "experts"
        elif isinstance(module, QuantizedMLP):
            kinds[name] = "mlp"
        elif isinstance(module, QuantizedLinear) and name.rpartition(".")[0] not in kinds:
            kinds[name] = "linear"
    return kinds


def _from_tensors(kind: str, name: str, tensors: dict[str, Tensor]) -> nn.Module:
    def of(part: str) -> dict[str, Any]:
        start = f"{name}.{part}"
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    if kind == "experts":
        return QuantizedExperts(**of(""))
    if kind == "linear":
        return QuantizedLinear(**of(""))
    gate_up = QuantizedLinear(**of("gate_up."), activation="swiglu")
    return QuantizedMLP(gate_up, QuantizedLinear(**of("down.")))


def _empty(name: str, directory: Path, attention: str | None) -> Any:
    """A model without data of the configuration in a directory."""
    cls: Any = getattr(transformers, name, None)
    config: Any = transformers.AutoConfig.from_pretrained(directory)
    if attention in _ATTENTION:
        config._attn_implementation = attention
    if not isinstance(config, getattr(cls, "config_class", None) or ()):
        expected = f"a model class of transformers for {type(config).__name__}"
        raise ArgumentError("load_quantized", "directory", expected, name)
    with torch.device("meta"):
        model: Any = cls(config)
    families.family_of("load_quantized", model)
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = {name for name, _ in _tensors(model)}
    if wanted != set(tensors):
        missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
        got = f"missing {missing[:3]}, unknown {unknown[:3]}"
        raise ArgumentError("load_quantized", "directory", "the tensors of the model", got)
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor
