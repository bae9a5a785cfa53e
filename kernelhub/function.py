"""The functions that callers call: generated with each op's true signature.

Names of generated code begin with an underscore, those of an op's parameters do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch.compiler import is_dynamo_compiling

from kernelhub import compile as torch_ops
from kernelhub import grammar, plugins, policy, registry
from kernelhub.dispatch import OBSERVERS, Planned, Table, key_for
from kernelhub.errors import ArgumentError, PolicyError
from kernelhub.selection import Selection
from kernelhub.spec import Args, OpSpec, TensorDesc

_HEAD = """\
def {name}{signature}:
    if _tracing():
        return _traced({call})
"""

_FIND = """\
    _like = _key({positional})
    _found = _known(_like)
    if _found is None:
        _found = _unknown(_like, {positional})
"""

_CALL = (
    _HEAD
    + _FIND
    + """\
    try:
        return _found({positional})
    except _Exception as _error:
        _failed(_error, {call})
        raise
"""
)

_PLAN = _HEAD + "    return _run({positional})\n"

# A kernel that is prepared writes to memory past torch: what traces it must see the op instead.
_PLAN_OF_PREPARED = (
    _HEAD
    + """\
    if {observed}:
        return _traced({call})
"""
    + _FIND
    + "    return _found({positional})\n"
)
_OBSERVERS = {f"_observer_{i}": ask for i, ask in enumerate(OBSERVERS)}
_OBSERVED = " or ".join(f"{name}()" for name in _OBSERVERS)


def _parameters(spec: OpSpec, without: frozenset[str] = frozenset()) -> str:
    """The signature as source, without annotations; defaults live in `_defaults`."""
    parts, keyword_only = [], False
    for p in spec.signature.parameters.values():
        if p.name in without:
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        default = "" if p.default is p.empty else f"=_defaults[{p.name!r}]"
        parts.append(p.name + default)
    return f"({', '.join(parts)})"


def _arguments(spec: OpSpec, left_out: frozenset[str] = frozenset()) -> str:
    """The arguments of a call that hands every parameter on, but for those left to defaults."""
    parts, by_name = [], False
    for p in spec.signature.parameters.values():
        by_name = by_name or p.kind is p.KEYWORD_ONLY or p.name in left_out
        if p.name not in left_out:
            parts.append(f"{p.name}={p.name}" if by_name else p.name)
    return ", ".join(parts)


class OpFunction(Protocol):
    """An op as callers see it: a function with the op's signature, and what hangs on it."""

    spec: OpSpec
    reference: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def on(self, backend: str) -> Callable[..., Any]: ...
    def explain(self, *args: Any, **kwargs: Any) -> Selection: ...
    def plan(self, *args: Any, **kwargs: Any) -> Callable[..., Any]: ...
    def backends(self) -> tuple[str, ...]: ...


class Op:
    """What hangs on an op function: its contract, its backends, its choices."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.table = Table(spec)
        self._on: dict[str, tuple[Callable[..., Any], Table]] = {}
        torch_ops.register(spec, lambda backend: self.on(backend) if backend else self.function)
        function = self._make(self.table, "")
        function.__doc__ = spec.prototype.__doc__
        for name in ("on", "explain", "plan", "backends", "spec"):
            setattr(function, name, getattr(self, name))
        self.function = cast(OpFunction, function)
        self.function.reference = spec.reference

    def _make(self, table: Table, on: str) -> Callable[..., Any]:
        spec = self.spec
        traced = torch_ops.traced(spec, on, _parameters(spec))
        source = _CALL.format(
            name=spec.name,
            signature=_parameters(spec),
            call=_arguments(spec),
            positional=", ".join(spec.signature.parameters),
        )

        traced_by_position = spec.by_position(traced)

        def not_real(*values: Any) -> Any:
            call = spec.bind(*values)
            if any(isinstance(value, TensorDesc) for value in spec.tensors(call).values()):
                raise ArgumentError(
                    spec.name,
                    spec.device_param,
                    "a tensor (a description can be explained, not run)",
                    getattr(call, spec.device_param),
                )
            return traced_by_position(*values)  # fake tensors and tensor subclasses

        table.not_real = not_real
        namespace = {
            "_tracing": is_dynamo_compiling,
            "_traced": traced,
            "_known": table.known.get,
            "_key": key_for(spec, table.checks),
            "_unknown": table.checked,
            "_failed": table.failed,
            "_Exception": Exception,
        }
        table.namespace = namespace
        function = torch_ops.compiled_function(source, spec.name, namespace, spec)
        function.__signature__ = spec.signature  # type: ignore[attr-defined]
        function.__annotations__ = dict(spec.prototype.__annotations__)
        function.__module__, function.__qualname__ = "kernelhub.ops", spec.name
        return function

    def on(self, backend: str) -> Callable[..., Any]:
        """This op under one choice: `on("reference")` forces, `on("cuda,auto")` prefers.

        Raises `PolicyError` for an unknown backend or malformed text.
        """
        if backend not in self._on:
            plugins.load()
            rules = grammar.parse(backend)
            if "=" in backend or ";" in backend:
                raise PolicyError(
                    f"{self.spec.name}.on takes one choice for this op, got {backend!r}"
                )
            rules.validate(registry.specs(), plugins.known_backends())
            wish = policy.Wish(rules.match(self.spec.name), f'on("{backend}")')
            table = Table(self.spec, wish)
            with registry.lock:
                self._on.setdefault(backend, (self._make(table, backend), table))
        return self._on[backend][0]

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Args:
        self.spec.signature.bind(*args, **kwargs)  # the op's own TypeError for a malformed call
        call = self.spec.bind(*args, **kwargs)
        self.spec.validate(call)
        return call

    def explain(self, /, *args: Any, **kwargs: Any) -> Selection:
        """Which backend would run this call, and why no other. Runs nothing.

        Takes the op's arguments; tensors may be real, fake or `kernelhub.TensorDesc`.
        """
        call = self._checked(args, kwargs)
        return self.table.ranking(self.spec.device(call)).selection(call)

    def backends(self) -> tuple[str, ...]:
        """Names of the backends that implement this op, best first."""
        plugins.load()
        return tuple(dict.fromkeys(e.backend.name for e in registry.entries(self.spec.name)))

    def plan(self, /, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Check and choose once, and return a function for the calls of one layer.

        Takes a whole call as example. The returned function has the weights and options bound and
        takes the rest (for `fused_gemv`: `run(x, x_scale=None, *, out=None)`). It checks nothing
        again: pass tensors like the example's in dtype, device and layout. Compiled kernels read
        and write their memory as it is: of a negated view (`torch.Tensor.is_neg`) with the other
        sign, of a tensor that requires grad without a derivative. A later change of policy does not
        reach it.

        Raises:
            ArgumentError: the example breaks the op's contract.
            BackendUnavailable: no allowed backend can run it.
        """
        spec = self.spec
        call = self._checked(args, kwargs)
        fixed = frozenset(p.name for p in spec.params if p.fixed)
        for name in fixed:
            if isinstance(getattr(call, name), TensorDesc):
                wanted = "a tensor (a description cannot be bound)"
                raise ArgumentError(spec.name, name, wanted, getattr(call, name))
        entry = self.table.select(self.table.ranking(spec.device(call)), call, stacklevel=4)
        parameters = spec.signature.parameters
        default = frozenset(n for n in fixed if getattr(call, n) is parameters[n].default)
        template = _PLAN_OF_PREPARED if entry.implementation.prepare else _PLAN
        source = template.format(
            name=f"{spec.name}_plan",
            signature=_parameters(spec, without=fixed),
            call=_arguments(spec, left_out=default),
            positional=", ".join(parameters),
            observed=_OBSERVED,
        )
        planned = Planned(spec, entry)
        namespace = planned.namespace = {
            "_tracing": is_dynamo_compiling,
            **_OBSERVERS,
            "_traced": torch_ops.traced(spec, entry.backend.name, _parameters(spec)),
            "_run": entry.run,
            "_known": planned.known.get,
            "_key": key_for(spec, planned.checks),
            "_unknown": planned.prepared,
            **{name: getattr(call, name) for name in fixed},
        }
        run = torch_ops.compiled_function(source, f"{spec.name}_plan", namespace, spec)
        run.__doc__ = f"{spec.name} on {entry.name} with {', '.join(sorted(fixed))} bound."
        run.selection = self.table.ranking(spec.device(call)).selection(call)  # type: ignore[attr-defined]
        return run

    def clear(self) -> None:
        """Forget every choice made so far."""
        self.table.clear()
        for _, table in self._on.values():
            table.clear()


_ops: dict[str, Op] = {}


def add(spec: OpSpec) -> OpFunction:
    """Register an op and return its function. See `registry.add_op` for what is checked."""
    with registry.lock:
        registry.add_op(spec)
        try:
            _ops[spec.name] = Op(spec)
        except BaseException:
            registry.remove_op(spec.name)
            torch_ops.unregister(spec.name)
            raise
        return _ops[spec.name].function


def remove(name: str) -> None:
    """Take an op out (for tests and reloads)."""
    with registry.lock:
        registry.remove_op(name)
        del _ops[name]
        torch_ops.unregister(name)


def get(name: str) -> OpFunction:
    """The function of an op. Raises `UnknownName`, with the nearest name, where there is none."""
    return _find(name).function


def _find(name: str) -> Op:
    if name not in _ops:
        plugins.load()  # a plug-in may bring ops of its own
    if name not in _ops:
        registry.spec(name)  # raises with the known names
    return _ops[name]


def entry_for(name: str, backend: str, call: Args) -> registry.Entry | None:
    """The implementation that `op.on(backend)` runs for a call."""
    op = _find(name)
    op.on(backend)
    table = op._on[backend][1]
    return table.ranking(op.spec.device(call)).pick(call)


def _clear_all() -> None:
    for op in _ops.values():
        op.clear()


registry.on_change(_clear_all)
