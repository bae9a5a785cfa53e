"""What an op is: the frozen classes in which a contract is written down.

An `OpSpec` holds everything that is known about one op and nothing about who runs it. The functions
in it (`check`, `outputs`, `oracle`, `cost`) take one `Args` object: the arguments of a call as
attributes, defaults filled in. The reference alone has the op's own signature, for it is the
readable definition.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import attrs
import torch

from kernelhub.errors import ArgumentError, RegistrationError, describe

Args = Any
"""The arguments of one call as attributes. Its class is generated per op (see `OpSpec.bind`)."""


@attrs.frozen
class DeviceDesc:
    """A device that this process's torch need not know, such as `musa:0` on a CPU-only build."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


Device = torch.device | DeviceDesc


def parse_device(text: str) -> Device:
    """`cuda:1`, `musa`: a torch device where torch knows the type, else a description of one."""
    try:
        return torch.device(text)
    except RuntimeError:
        kind, _, index = text.partition(":")
        if not kind.isidentifier() or (index and not index.isdigit()):
            raise ValueError(f"not a device: {text!r}") from None
        return DeviceDesc(kind, int(index) if index else None)


def contiguous_strides(shape: Iterable[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@attrs.frozen
class TensorDesc:
    """A tensor described, not allocated: enough for checks, shape functions and `rejects`.

    Has the attributes and methods of `torch.Tensor` that those read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: Device = torch.device("cpu")
    strides: tuple[int, ...] | None = None
    alignment: int = 16  # bytes
    requires_grad: bool = False
    layout: torch.layout = torch.strided

    @classmethod
    def like(cls, tensor: Any) -> TensorDesc:
        """A description of `tensor` (real, fake or described)."""
        if isinstance(tensor, cls):
            return tensor
        return cls(
            tuple(tensor.shape),
            tensor.dtype,
            tensor.device,
            tuple(tensor.stride()) if tensor.layout is torch.strided else None,
            requires_grad=tensor.requires_grad,
            layout=tensor.layout,
        )

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def element_size(self) -> int:
        return self.dtype.itemsize

    def stride(self, dim: int | None = None) -> Any:
        strides = self.strides if self.strides is not None else contiguous_strides(self.shape)
        return strides if dim is None else strides[dim]

    def is_contiguous(self) -> bool:
        return self.strides is None or all(
            size == 1 or stride == dense
            for size, stride, dense in zip(
                self.shape, self.strides, contiguous_strides(self.shape), strict=True
            )
        )

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def empty(self) -> torch.Tensor:
        """Allocate it, uninitialised."""
        assert isinstance(self.device, torch.device)
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _dtypes(dtypes: Iterable[torch.dtype]) -> frozenset[torch.dtype]:
    return frozenset(dtypes)


Role = Literal["input", "in_place", "output", "attribute"]


@attrs.frozen
class Param:
    """One parameter of an op: what it may be, in the letters of the contract.

    `types` lists the Python types allowed beside (or instead of) a tensor; `dtypes` is empty where
    no tensor is allowed. `ranks` is the allowed number of dimensions. `fixed` marks what stays the
    same for the life of a layer (weights, options), which is what `op.plan` binds. `any_number`
    marks a number that the op's own check does not look at: one is as good as another (a seed).
    """

    name: str
    role: Role = "input"
    dtypes: frozenset[torch.dtype] = attrs.field(default=(), converter=_dtypes)
    ranks: range = range(0, 65)
    shape: str = ""
    types: tuple[type, ...] = ()
    choices: tuple[Any, ...] = ()
    optional: bool = False
    fixed: bool = False
    any_number: bool = False

    @property
    def is_tensor(self) -> bool:
        return bool(self.dtypes)

    def expected(self) -> str:
        """What a caller may pass, as the sentence of an error."""
        parts = []
        if self.is_tensor:
            names = "|".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            parts.append(f"a tensor {self.shape} {names}".replace("  ", " "))
        if self.choices:
            parts.append(" or ".join(repr(choice) for choice in self.choices))
        else:
            parts.extend(
                f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"
                for kind in self.types
            )
        if self.optional:
            parts.append("None")
        return " or ".join(parts)


@attrs.frozen
class Cost:
    """Bytes that a call must move to and from memory, and its arithmetic operations."""

    read_bytes: int
    write_bytes: int
    operations: int

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes


@attrs.frozen
class Expected:
    """The truth about one output: its value in float64 and how far a backend may be from it.

    `bound` broadcasts against `value`; a bound of zero asks for the exact value.
    """

    name: str
    value: torch.Tensor
    bound: torch.Tensor


@attrs.frozen
class Case:
    """One named call: arguments on the CPU, made afresh from a generator.

    `error` names the argument that an `ArgumentError` must blame, where the call is a bad one.
    """

    name: str
    kind: Literal["typical", "boundary", "hostile"]
    make: Callable[[torch.Generator], dict[str, Any]]
    error: str | None = None

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        return self.make(torch.Generator().manual_seed(seed))


@attrs.frozen
class Traits:
    """What an implementation promises beyond the op's bound.

    deterministic: same inputs on the same device give the same bits.
    batch_invariant: a row's bits do not depend on the other rows, for up to 16 rows.
    graph_safe: never synchronises and allocates only through torch, so a device graph can hold it.
    differentiable: torch can differentiate through it.
    """

    deterministic: bool = True
    batch_invariant: bool = True
    graph_safe: bool = True
    differentiable: bool = False


@attrs.frozen
class OpSpec:
    """The contract of one op.

    Attributes:
        prototype: function with the op's name, signature and public docstring; never called.
        params: one `Param` per parameter of the signature, in order.
        check: raises `ArgumentError` for what `params` alone cannot express.
        outputs: shape function; descriptions of all outputs the op returns, in order.
        reference: the definition in plain PyTorch, with the op's own signature.
        oracle: `(args, chain)` to one `Expected` for each returned and each in-place tensor, in
            order. `chain` is the longest chain of fp32 additions that the backend declares, or
            None for the worst case.
        cases: typical, boundary and hostile calls.
        cost: bytes and operations of a call.
        device_param: the parameter whose device decides.
        version: raised when the meaning or the signature changes.
        all_outputs: argument values under which every output is returned (used where a return type
            must be fixed, as in a torch schema).
        finish: `(args, outputs)` to what the op returns, where not simply the one output.
        random: the result depends on a generator's state unless seeds are passed.
        rows: the parameters whose first dimension counts the rows of the batch.
        reference_traits: what the reference promises.
    """

    prototype: Callable[..., Any]
    params: tuple[Param, ...]
    check: Callable[[Args], None]
    outputs: Callable[[Args], tuple[TensorDesc, ...]]
    reference: Callable[..., Any]
    oracle: Callable[[Args, int | None], tuple[Expected, ...]]
    cases: Callable[[], Iterator[Case]]
    cost: Callable[[Args], Cost]
    device_param: str
    version: int = 1
    num_outputs: int = 1
    all_outputs: Mapping[str, Any] = attrs.field(factory=dict)
    finish: Callable[[Args, tuple[Any, ...]], Any] | None = None
    random: bool = False
    rows: tuple[str, ...] = ()
    reference_traits: Traits = Traits(differentiable=True)

    signature: inspect.Signature = attrs.field(init=False)
    bind: Callable[..., Args] = attrs.field(init=False)
    _checks: tuple[tuple[Any, ...], ...] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        signature = inspect.signature(self.prototype)
        for name in signature.parameters:
            if name.startswith("_"):  # as those of generated code do
                raise RegistrationError(
                    f"op '{self.name}': the parameter '{name}' begins with an underscore"
                )
        object.__setattr__(self, "signature", signature)
        object.__setattr__(self, "bind", _args_class(self.name, signature))
        writes = ("in_place", "output")
        checks = tuple((p.name, p, p.dtypes, p.ranks, p.role in writes) for p in self.params)
        object.__setattr__(self, "_checks", checks)

    @property
    def name(self) -> str:
        return self.prototype.__name__

    @property
    def differentiable(self) -> bool:
        """Whether a gradient of the one output can be taken (nothing is written in place)."""
        in_place = any(p.role == "in_place" for p in self.params)
        return self.num_outputs == 1 and not in_place and not self.random

    @property
    def mutated(self) -> tuple[str, ...]:
        """Names of the parameters that a call writes to."""
        return tuple(p.name for p in self.params if p.role in ("in_place", "output"))

    def param(self, name: str) -> Param:
        return next(p for p in self.params if p.name == name)

    def validate(self, args: Args) -> Any:
        """Raise `ArgumentError` unless the call keeps the contract. Reads no tensor data.

        Returns the device that decides, or `NOT_REAL` where a tensor is fake, wrapped or described.
        """
        device = check_params(self, args)
        self.check(args)
        return device

    def without_numbers(self, args: Args) -> Args:
        """The call with the numbers that calls alike do not share replaced by ones that cannot be
        read: whoever tries gets a `TypeError`."""
        values = (getattr(args, p.name) for p in self.params)
        return self.bind(
            *(
                _Unread(type(value)) if p.any_number and type(value) in (int, float) else value
                for p, value in zip(self.params, values, strict=True)
            )
        )

    def by_position(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the op's signature as one that takes every argument by position."""
        parameters = self.signature.parameters
        handed_on = (
            n if p.kind is not p.KEYWORD_ONLY else f"{n}={n}" for n, p in parameters.items()
        )
        source = f"lambda {', '.join(parameters)}: _run({', '.join(handed_on)})"
        made: Callable[..., Any] = eval(source, {"_run": function})
        return made

    def device(self, args: Args) -> Device:
        device: Device = getattr(args, self.device_param).device
        return device

    def tensors(self, args: Args) -> dict[str, Any]:
        """The tensor arguments that were given, by name."""
        given = {p.name: getattr(args, p.name) for p in self.params if p.is_tensor}
        return {name: value for name, value in given.items() if is_tensor(value)}


def _args_class(op: str, signature: inspect.Signature) -> Callable[..., Args]:
    """A slotted class with one attribute per parameter, in the order of the signature."""
    names = list(signature.parameters)
    body = "\n        ".join(f"_self.{name} = {name}" for name in names)
    plain = signature.replace(
        parameters=[
            p.replace(
                kind=p.POSITIONAL_OR_KEYWORD,  # the generated callers pass everything by position
                annotation=p.empty,
                default=p.empty if p.default is p.empty else _Name(f"_defaults[{p.name!r}]"),
            )
            for p in signature.parameters.values()
        ],
        return_annotation=signature.empty,
    )
    source = (
        f"class {op}_args:\n"
        f"    __slots__ = {tuple(names)!r}\n"
        f"    def __init__(_self, {str(plain)[1:-1]}):\n        {body}\n"
    )
    defaults = {n: p.default for n, p in signature.parameters.items()}
    namespace: dict[str, Any] = {"_defaults": defaults, "__name__": "kernelhub.spec"}
    exec(compile(source, f"<kernelhub {op} arguments>", "exec"), namespace)
    made: Callable[..., Args] = namespace[f"{op}_args"]
    return made


class _Unread:
    """A number, for `isinstance`, that says nothing about its value."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._kind

    def _read(self, *_: Any) -> Any:
        raise TypeError(f"this {self._kind.__name__} differs between calls that are alike")

    __bool__ = __int__ = __float__ = __index__ = __str__ = __repr__ = __format__ = _read
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _read


class _Name:
    """Renders as an expression inside a generated signature."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def __repr__(self) -> str:
        return self.expression


def is_tensor(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, TensorDesc))


def same_storage_span(a: Any, b: Any) -> bool:
    """Whether two real tensors may share memory: the spans of bytes that they reach overlap."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if not (has_memory(a) and has_memory(b)) or a.numel() == 0 or b.numel() == 0:
        return False  # fake and wrapped tensors have none to compare
    if a.device != b.device or a.device.type == "meta":
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    return start_a < start_b + _span_bytes(b) and start_b < start_a + _span_bytes(a)


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def has_memory(t: Any) -> bool:
    """Whether a tensor is ordinary memory: one of torch's own, or of a subclass that only names it
    otherwise, as parameters do."""
    return type(t) in _PLAIN or _is_memory(type(t))


def _span_bytes(t: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def same_view(a: Any, b: Any) -> bool:
    """Whether two tensors are exactly the same elements in the same order."""
    return bool(
        a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
    )


def overlaps_itself(t: Any) -> bool:
    """Whether two indices of a tensor may reach one element (of an expanded tensor, say)."""
    if not has_memory(t) or t.numel() == 0 or t.is_contiguous():
        return False
    reached = 0
    sizes_strides = zip(t.shape, t.stride(), strict=True)
    for size, stride in sorted(sizes_strides, key=lambda pair: pair[1]):
        if size > 1:
            if stride <= reached:
                return True
            reached += (size - 1) * stride
    return False


NOT_REAL = object()
"""Stands for the device of a call whose tensors are not all real memory."""


def check_params(spec: OpSpec, args: Args) -> Any:
    """The part of a check that `Param` expresses: type, dtype, rank, layout, device.

    Returns what `OpSpec.validate` does.
    """
    device = None
    real = True
    for name, param, dtypes, ranks, writes in spec._checks:
        value = getattr(args, name)
        if type(value) not in _PLAIN:
            if value is None and param.optional:
                continue
            if not isinstance(value, (torch.Tensor, TensorDesc)):
                _check_plain(spec.name, param, value)
                continue
            real = real and _is_memory(type(value))
        if value.dtype not in dtypes or value.dim() not in ranks:
            raise ArgumentError(spec.name, name, param.expected(), value)
        if value.layout is not torch.strided:
            raise ArgumentError(spec.name, name, "a strided tensor", str(value.layout))
        if real and value.is_neg():  # its memory holds the values with the other sign
            raise ArgumentError(
                spec.name, name, "a plain tensor (call resolve_neg())", "a negated view"
            )
        if writes and (value.requires_grad or (real and value.is_inference())):
            _check_writable(spec.name, name, value)
        if value.device != device:
            if device is not None:
                raise _wrong_device(spec, name, device, value)
            device = _lead_device(spec, args)
            if value.device != device:
                raise _wrong_device(spec, name, device, value)
    return device if real else NOT_REAL


def _is_memory(kind: type) -> bool:
    """Whether tensors of a subclass are ordinary memory under another name, as parameters are."""
    hook = getattr(kind, "__torch_dispatch__", None)
    return issubclass(kind, torch.Tensor) and hook is torch._C._disabled_torch_dispatch_impl


def _wrong_device(spec: OpSpec, name: str, device: Device, value: Any) -> ArgumentError:
    wanted = f"a tensor on {device}, the device of '{spec.device_param}'"
    return ArgumentError(spec.name, name, wanted, value)


def _lead_device(spec: OpSpec, args: Args) -> Device:
    lead = getattr(args, spec.device_param)
    if not isinstance(lead, (torch.Tensor, TensorDesc)):
        param = spec.param(spec.device_param)
        raise ArgumentError(spec.name, param.name, param.expected(), lead)
    return lead.device


def _check_writable(op: str, name: str, value: Any) -> None:
    """Torch forbids writing to a leaf that requires grad, to a view of one, and to a tensor made
    under inference_mode outside of it."""
    if value.is_inference():
        if not torch.is_inference_mode_enabled():
            wanted = "a tensor that may be written to (clone it, or call under inference_mode())"
            raise ArgumentError(op, name, wanted, "an inference tensor")
        return
    base = getattr(value, "_base", None)
    leaf = getattr(value, "is_leaf", True) or (base is not None and base.is_leaf)
    if leaf and torch.is_grad_enabled():
        raise ArgumentError(
            op,
            name,
            "a tensor that may be written to (use torch.no_grad())",
            "a leaf that requires grad",
        )


def _check_plain(op: str, param: Param, value: Any) -> None:
    kinds = param.types
    if isinstance(value, (torch.SymInt, torch.SymFloat)) and (int in kinds or float in kinds):
        return  # a number that a trace keeps symbolic
    if isinstance(value, bool) and bool not in kinds:
        raise ArgumentError(op, param.name, param.expected(), describe(value))
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ArgumentError(
            op, param.name, f"{param.expected()} of at most 64 bits", describe(value)
        )
    if isinstance(value, int) and float in kinds:
        return
    if not kinds or not isinstance(value, kinds):
        raise ArgumentError(op, param.name, param.expected(), describe(value))
    if param.choices and value not in param.choices:
        raise ArgumentError(op, param.name, param.expected(), describe(value))


def check_out(op: str, out: Any, expected: TensorDesc, inputs: Mapping[str, Any]) -> None:
    """Check an `out` argument: shape, dtype, no element twice, no overlap with an input."""
    if out is None:
        return
    if tuple(out.shape) != tuple(expected.shape) or out.dtype != expected.dtype:
        raise ArgumentError(op, "out", str(_shape_text(expected)), out)
    if overlaps_itself(out):
        raise ArgumentError(
            op, "out", "a tensor without overlapping elements", f"strides {out.stride()}"
        )
    for name, value in inputs.items():
        if name != "out" and same_storage_span(out, value):
            raise ArgumentError(op, "out", f"memory apart from '{name}'", "overlapping memory")


def _shape_text(desc: TensorDesc) -> str:
    shape = ", ".join(str(size) for size in desc.shape)
    return f"[{shape}] {str(desc.dtype).removeprefix('torch.')}"
