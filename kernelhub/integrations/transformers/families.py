"""The families of models that are known: where their layers are and what they are called."""

from __future__ import annotations

import importlib
import inspect
from types import MethodType, ModuleType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from kernelhub.errors import ArgumentError
from kernelhub.integrations.transformers import patches
from kernelhub.spec import has_memory

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# No plain memory, and taken: the ops know fakes, and FSDP puts a plain weight in the place of its
# own for each call.
_TAKEN: tuple[type, ...] = (FakeTensor,)
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    _TAKEN += (DTensor,)


@attrs.frozen
class Layer:
    """A layer of a model and what becomes of it: the op that it runs through, or why none."""

    name: str
    kind: str
    op: str
    why: str = ""


@attrs.frozen
class Family:
    """Names of a family's classes and functions in its modelling module."""

    model_type: str
    attention: str
    rotary: tuple[str, ...]
    norm: str
    mlp: str | None = None
    experts: str | None = None
    moe: str | None = None  # a block that adds shared experts to routed ones
    router: str | None = None  # softmax over all experts, then the largest

    @property
    def module(self) -> ModuleType:
        name = self.model_type
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def kind_of(self, module: nn.Module) -> str | None:
        """What a module is in the family, "attention" or "mlp" say; None where none of these."""
        for kind in ("attention", "mlp", "experts", "moe", "router", "norm"):
            name = getattr(self, kind)
            if name is not None and isinstance(module, getattr(self.module, name)):
                return kind
        return None


_ROTARY = ("apply_rotary_pos_emb",)
_FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaAttention", _ROTARY, "LlamaRMSNorm", mlp="LlamaMLP"),
        Family("qwen2", "Qwen2Attention", _ROTARY, "Qwen2RMSNorm", mlp="Qwen2MLP"),
        Family("qwen3", "Qwen3Attention", _ROTARY, "Qwen3RMSNorm", mlp="Qwen3MLP"),
        Family(
            "qwen3_moe",
            "Qwen3MoeAttention",
            _ROTARY,
            "Qwen3MoeRMSNorm",
            mlp="Qwen3MoeMLP",
            experts="Qwen3MoeExperts",
            router="Qwen3MoeTopKRouter",
        ),
        Family(
            "mixtral",
            "MixtralAttention",
            _ROTARY,
            "MixtralRMSNorm",
            experts="MixtralExperts",
            router="MixtralTopKRouter",
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3Attention",
            (*_ROTARY, "apply_rotary_pos_emb_interleave"),
            "DeepseekV3RMSNorm",
            mlp="DeepseekV3MLP",
            experts="DeepseekV3Experts",
            moe="DeepseekV3MoE",
        ),
    )
}


def family_of(function: str, model: Any) -> Family:
    """The family of a model. Raises `ArgumentError` where it is of none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        got = f"{type(model).__name__} of model_type {model_type!r}"
        raise ArgumentError(function, "model", f"a transformers model of {known}", got)
    return _FAMILIES[model_type]


def refusal(family: Family, kind: str, module: nn.Module) -> str:
    """Why a module of a family's class for `kind` keeps its own code; empty where it need not."""
    name = getattr(family, kind)
    if type(module) is not getattr(family.module, name):
        return f"what this subclass of {name} adds is not known"
    if replaced(module):
        return "its forward has been replaced"
    if kind == "attention":
        return _attention_refusal(family, module)
    refusals = {"mlp": _mlp_refusal, "experts": experts_refusal, "moe": _moe_refusal}
    return refusals[kind](module) if kind in refusals else ""


def _attention_refusal(family: Family, attention: nn.Module) -> str:
    """Why an attention module's rotary embedding cannot be replaced."""
    names = inspect.unwrap(type(attention).forward).__code__.co_names
    if not any(name in names for name in family.rotary):
        return f"its forward does not call {' or '.join(family.rotary)}"
    return ""


_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def _mlp_refusal(mlp: nn.Module) -> str:
    """Why a gate-up MLP cannot run as one SwiGLU."""
    parts: Any = mlp
    for name in ("gate_proj", "up_proj"):
        part = getattr(mlp, name)
        why = linear_refusal(part) if isinstance(part, nn.Linear) else "not an nn.Linear"
        if why:
            return f"'{name}', a {type(part).__name__}: {why}"
    if (parts.gate_proj.bias is None) != (parts.up_proj.bias is None):
        return "one of gate and up has a bias, the other has none"
    if parts.gate_proj.weight.dtype != parts.up_proj.weight.dtype:
        return "gate and up are of two dtypes"
    why = _activation_refusal(mlp)
    if not why and (type(parts.act_fn) not in _SILU or replaced(parts.act_fn)):
        why = f"its activation, a {type(parts.act_fn).__name__}, is not known to be SiLU"
    return why


def experts_refusal(experts: nn.Module) -> str:
    """Why an experts module cannot run as SwiGLU and a weighted sum; empty where it can."""
    layout: Any = experts
    if not layout.has_gate or not layout.is_concatenated or layout.is_transposed:
        return "its weights are not [E, gate rows then up rows, K]"
    if layout.has_bias:
        return "its experts have biases"
    if getattr(layout, "has_post_expert_norm", False):  # not in every version
        return "it normalises each expert's output"
    weights = layout.gate_up_proj, layout.down_proj
    return next(filter(None, map(_weight_refusal, weights)), "") or _activation_refusal(experts)


def _activation_refusal(module: Any) -> str:
    config = module.config
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is '{config.hidden_act}', the op's gated one is SwiGLU (silu)"
    return ""


def _moe_refusal(block: Any) -> str:
    """Why a block's shared experts cannot be added by the op."""
    for part, name in ((block, "shared_experts"), (block.gate, "routed_scaling_factor")):
        if not hasattr(part, name):
            return f"{type(part).__name__} has no '{name}'"
    return "its router's forward has been replaced" if replaced(block.gate) else ""


def linear_refusal(linear: nn.Linear) -> str:
    """Why an `nn.Linear` cannot run through GEMV; empty where it can."""
    if type(linear) is not nn.Linear:
        return "what this subclass of nn.Linear adds is not known"
    return _weight_refusal(linear.weight) or (
        "its forward has been replaced" if replaced(linear) else ""
    )


def _weight_refusal(weight: Tensor) -> str:
    """Why the ops cannot take a weight."""
    if weight.dtype not in FLOATS:
        return f"weight of {str(weight.dtype).removeprefix('torch.')}"
    if not (has_memory(weight) or isinstance(weight, _TAKEN)):
        return f"its weight, a {type(weight).__name__}, is no plain memory"
    return ""


def replaced(module: nn.Module) -> bool:
    """Whether others than kernelhub have put a forward of their own on a module."""
    found = vars(module).get("forward")
    if found is None or isinstance(found, patches.Patch):
        return False
    # Of a copy that was made of an accelerated module: its class's own.
    return bool(found != MethodType(type(module).forward, module))


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def no_op(module: nn.Module) -> str:
    """Why a module with weights of its own, of no kind that is known, has no op."""
    if isinstance(module, nn.Embedding):
        return "no op looks up embeddings"
    if is_norm(module):
        return "no op normalises its input alone"
    if type(module).__name__.endswith("Router"):
        return "its product is a part of the routing, of no nn.Linear"
    return "no op computes it"
