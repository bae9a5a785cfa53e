"""What can be timed: the shapes of an op, from models, from `--shape`, or from a suite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from kernelhub import registry
from kernelhub.bench import inputs
from kernelhub.bench.inputs import Calls, Facts, Maker
from kernelhub.bench.models import MODELS, Model
from kernelhub.errors import KernelhubError, nearest
from kernelhub.spec import TensorDesc

MOST_SETS = 48
LARGEST = 2**24  # of any size
MOST_CHOICES = 2**24  # tokens times experts: their order is drawn on the host


class CaseError(KernelhubError, ValueError):
    """A case that cannot be: the message says what can."""


@attrs.frozen
class Kind:
    """How the calls of one op are written.

    `facts` maps each fact to its default, or to its type where it must be given; `choices` lists
    the words that a fact may be.
    """

    build: Callable[[Maker, str, int, Facts], Iterator[Calls]]
    rows: str
    facts: dict[str, Any]
    schemes: tuple[str, ...]
    choices: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    of_model: Callable[[Model], dict[str, Facts]] = attrs.field(kw_only=True)


def _gemv_layers(m: Model) -> dict[str, Facts]:
    return {
        name: {"N": n, "K": k, "act": "swiglu" if name == "gate-up" else "none"}
        for name, (n, k) in m.weights().items()
    }


def _moe_layers(m: Model) -> dict[str, Facts]:
    if not m.experts:
        return {}
    sizes = {"E": m.experts, "k": m.top_k, "H": m.hidden, "I": m.intermediate}
    return {
        "gate-up": {**sizes, "stage": "gate-up"},
        "down": {**sizes, "stage": "down"},
        "layer": {**sizes, "stage": "layer", "reduce": True},
    }


def _heads(m: Model) -> dict[str, Facts]:
    return {"": {"Hq": m.heads, "Hk": m.kv_heads, "D": m.head_size, "rot": m.rot_dim}}


_WEIGHTS = ("bf16", "fp8", "int4", "w8a8", "fp16", "fp32")
_FLOATS = tuple(inputs.DTYPES)

KINDS = {
    "fused_gemv": Kind(
        inputs.fused_gemv,
        "M",
        {"N": int, "K": int, "act": "none"},
        _WEIGHTS,
        {"act": ("none", "swiglu", "silu", "gelu", "gelu_tanh")},
        of_model=_gemv_layers,
    ),
    "fused_moe_gemv": Kind(
        inputs.fused_moe_gemv,
        "M",
        {"E": int, "k": int, "H": int, "I": int, "stage": "gate-up", "reduce": False},
        _WEIGHTS,
        {"stage": ("gate-up", "down", "layer")},
        of_model=_moe_layers,
    ),
    "top_k_top_p_sampling_from_probs": Kind(
        inputs.sampling,
        "B",
        {"V": int, "k": 40, "p": 0.9, "dist": "zipf", "order": "top_k_first"},
        ("fp32",),
        {"dist": ("zipf", "gauss"), "order": ("top_k_first", "joint")},
        of_model=lambda m: {"": {"V": m.vocab}},
    ),
    "rotary_embedding": Kind(
        inputs.rotary_embedding,
        "T",
        {"Hq": int, "Hk": int, "D": 128, "rot": 0, "style": "neox", "cache": "fp32"},
        _FLOATS,
        {"style": ("neox", "gptj"), "cache": ("fp32", "same")},
        of_model=_heads,
    ),
    "fused_mul_add": Kind(
        inputs.fused_mul_add,
        "T",
        {"H": int},
        _FLOATS,
        of_model=lambda m: {"": {"H": m.hidden}},
    ),
}


@attrs.frozen
class Case:
    """One call (or a layer of calls) in numbers."""

    op: str
    facts: Facts
    rows: int
    scheme: str
    model: str = ""

    @property
    def name(self) -> str:
        kind = KINDS[self.op]
        shown = self.model or " ".join(
            f"{name}={value}"
            for name, value in self.facts.items()
            if kind.facts[name] is int or value != kind.facts[name]
        )
        return f"{shown} {kind.rows}={self.rows} {self.scheme}"

    def sets(self, device: torch.device, budget: int) -> list[Calls]:
        """Sets of inputs to rotate over: `budget` bytes, at most 48 sets."""
        return list(itertools.islice(self._endless(device, budget), self.num_sets(budget)))

    def num_sets(self, budget: int) -> int:
        size = self.cost(next(self._endless(torch.device("meta"), budget)))
        return min(MOST_SETS, max(1, math.ceil(budget / max(size, 1))))

    def memory_bytes(self, budget: int) -> int:
        """Bytes of all sets and of what the floor reads. Allocates nothing."""
        made = self.sets(torch.device("meta"), budget)
        values = (v for calls in made for call in calls for v in call.values())
        tensors = {id(t): t for t in values if isinstance(t, Tensor)}.values()
        return sum(t.nbytes for t in tensors) + max(budget, self.cost(made[0]))

    def cost(self, calls: Calls) -> int:
        """Bytes that a set's calls must move."""
        spec = registry.spec(self.op)
        return sum(spec.cost(spec.bind(**call)).bytes for call in calls)

    def described(self, device: torch.device) -> Calls:
        """A set's calls with descriptions in the place of tensors."""
        return [
            {
                name: TensorDesc(tuple(v.shape), v.dtype, device, v.stride())
                if isinstance(v, Tensor)
                else v
                for name, v in call.items()
            }
            for call in next(self._endless(torch.device("meta"), 0))
        ]

    def check(self) -> None:
        """Raise `ArgumentError` or `CaseError` for a call that the op refuses."""
        spec = registry.spec(self.op)
        if self.op == "fused_moe_gemv":
            experts, k = self.facts["E"], self.facts["k"]
            if k > experts or self.rows * experts > MOST_CHOICES:
                raise CaseError(f"{self.op} {self.name}: needs k <= E and M * E <= {MOST_CHOICES}")
        try:
            calls = next(self._endless(torch.device("meta"), 0))
        except (RuntimeError, ValueError, OverflowError) as error:
            raise CaseError(f"{self.op} {self.name}: {error}") from error
        for call in calls:
            spec.validate(spec.bind(**call))

    def _endless(self, device: torch.device, budget: int) -> Iterator[Calls]:
        kind = KINDS[self.op]
        return kind.build(Maker.on(device, budget), self.scheme, self.rows, self.facts)


def read_shape(op: str, text: str) -> Facts:
    """`N=4096,K=4096,act=swiglu` as facts, defaults filled in. Raises `CaseError`."""
    kind = KINDS[op]
    given: Facts = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in kind.facts or name in given:
            hint = nearest(name, kind.facts) if name not in given else f"{name} is given twice"
            raise CaseError(f"{op}: --shape '{text}': expected name=value; {hint}")
        given[name] = _value(op, name, value)
    return _with_defaults(op, given)


def _with_defaults(op: str, given: Facts) -> Facts:
    kind = KINDS[op]
    missing = [name for name, default in kind.facts.items() if default is int and name not in given]
    if missing:
        raise CaseError(f"{op}: the shape also needs {', '.join(missing)}")
    facts = {name: given.get(name, default) for name, default in kind.facts.items()}
    return facts


def _value(op: str, name: str, text: str) -> Any:
    default, words = KINDS[op].facts[name], KINDS[op].choices.get(name)
    if words:
        if text not in words:
            raise CaseError(f"{op}: {name} is no '{text}'; {nearest(text, words)}")
        return text
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise CaseError(f"{op}: {name} is true or false, not '{text}'")
        return text == "true"
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            raise CaseError(f"{op}: {name} is a number, not '{text}'") from None
    return read_size(f"{op}: {name}", text, least=0 if default is not int else 1)


def read_size(what: str, text: str, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= LARGEST):
        raise CaseError(f"{what} is a whole number from {least} to {LARGEST}, not '{text}'")
    return int(text)


def collect(
    ops: Iterable[str],
    models: Iterable[str],
    shapes: Iterable[str],
    rows: Iterable[int],
    schemes: Iterable[str] | None,
) -> list[Case]:
    """Every combination. Raises `CaseError` for what an op does not have."""
    found: list[Case] = []
    rows = tuple(rows)
    for op in ops:
        kind = KINDS[op]
        named: list[tuple[str, Facts]] = [("", read_shape(op, shape)) for shape in shapes]
        for model in models:
            if model not in MODELS:
                raise CaseError(f"no model named '{model}'; {nearest(model, MODELS)}")
            for layer, facts in kind.of_model(MODELS[model]).items():
                named.append((f"{model} {layer}".strip(), _with_defaults(op, facts)))
        wanted = kind.schemes[:1] if schemes is None else tuple(schemes)
        for scheme in wanted:
            if scheme not in kind.schemes:
                raise CaseError(f"{op} has no scheme '{scheme}'; {nearest(scheme, kind.schemes)}")
        found += [
            Case(op, facts, count, scheme, model)
            for model, facts in named
            for scheme in wanted
            for count in rows
        ]
    return found


_DECODE: tuple[tuple[str, str, tuple[str, ...], str, str], ...] = (
    # op, "model" or "shape", the models or shapes, rows, schemes
    (
        "fused_gemv",
        "shape",
        ("N=4096,K=4096", "N=22016,K=4096,act=swiglu", "N=28672,K=8192", "N=7168,K=2048"),
        "1,4,16",
        "bf16,fp8,int4",
    ),
    (
        "fused_moe_gemv",
        "model",
        ("qwen3-30b-a3b", "qwen3.5-35b-a3b", "deepseek-v3"),
        "1,4,16",
        "bf16,fp8,int4",
    ),
    (
        "top_k_top_p_sampling_from_probs",
        "shape",
        ("V=32000", "V=128256", "V=128256,k=0", "V=151936,k=1000", "V=262144"),
        "1,32,128",
        "fp32",
    ),
    ("rotary_embedding", "model", ("llama-3-8b", "llama-3-70b"), "1,64,4096", "bf16"),
    ("fused_mul_add", "shape", ("H=4096", "H=7168"), "1,64,2048", "bf16"),
)
SUITES = {"decode": _DECODE}


def suite(name: Literal["decode"] | str, ops: Iterable[str] = ()) -> list[Case]:
    """The cases of a suite, of all ops or of those named."""
    found: list[Case] = []
    wanted = tuple(ops)
    for op, how, what, rows, schemes in SUITES[name]:
        if not wanted or op in wanted:
            models, shapes = (what, ()) if how == "model" else ((), what)
            found += collect([op], models, shapes, map(int, rows.split(",")), schemes.split(","))
    return found
