"""The torch side of each op: one `torch.library` op in the namespace `kernelhub`.

Under `torch.compile`, and for fake and wrapped tensors, the op function calls this torch op, so
that whatever runs is one opaque node in the graph. The node chooses its backend when it runs, under
the policy of the thread that runs it.

A torch schema has no union types and no tensor that is both argument and result. So a parameter
that is a tensor or a number becomes two (`top_k`, `top_k_tensor`), and `out` is left out: the
function around the node copies into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from kernelhub import policy
from kernelhub.errors import RegistrationError
from kernelhub.spec import OpSpec, Param

NAMESPACE = "kernelhub"

_TYPES = {bool: "bool", int: "SymInt", float: "float", str: "str", torch.dtype: "ScalarType"}

# A torch op lives as long as its library object.
_libraries: dict[str, torch.library.Library] = {}


def _split(param: Param) -> bool:
    return param.is_tensor and bool(param.types)


def _in_schema(param: Param) -> bool:
    return param.role != "output" and torch.Generator not in param.types


def schema(spec: OpSpec) -> str:
    """The torch schema of an op, without its name."""
    parts, letters = [], iter("abcdefgh")
    for param in filter(_in_schema, spec.params):
        optional = "?" if param.optional else ""
        if param.is_tensor:
            alias = f"({next(letters)}!)" if param.role == "in_place" else ""
            kind = f"Tensor{alias}{'?' if _split(param) else optional}"
            parts.append(f"{kind} {param.name}{'_tensor' if _split(param) else ''}")
        if param.types:
            kind = next(name for python, name in _TYPES.items() if python in param.types)
            parts.append(f"{kind}{'?' if _split(param) else optional} {param.name}")
    parts.append("str backend")
    returns = "Tensor" if spec.num_outputs == 1 else f"({', '.join(['Tensor'] * spec.num_outputs)})"
    return f"({', '.join(parts)}) -> {returns}"


def _flat_names(spec: OpSpec) -> list[str]:
    names: list[str] = []
    for param in filter(_in_schema, spec.params):
        names.extend([f"{param.name}_tensor", param.name] if _split(param) else [param.name])
    return names


def _flatten_source(spec: OpSpec) -> str:
    """Expressions that turn an op's arguments into the torch op's, in order."""
    parts = []
    for param in filter(_in_schema, spec.params):
        name = param.name
        if name in spec.all_outputs:
            parts.append(repr(spec.all_outputs[name]))
        elif _split(param):
            parts.append(f"{name} if _isinstance({name}, _Tensor) else None")
            parts.append(f"None if _isinstance({name}, _Tensor) else {name}")
        else:
            parts.append(name)
    return ", ".join(parts)


def traced(spec: OpSpec, on: str, signature: str) -> Callable[..., Any]:
    """The function that a trace sees: the torch op, and around it what a schema cannot say."""
    name = spec.name
    lines = [
        f"def {name}_traced{signature}:",
        # Dynamo guards on what is read: a new policy text means a new graph.
        "    if _policy.trace_key == '\\0':",
        "        raise _AssertionError",
    ]
    for param in spec.params:
        if torch.Generator in param.types:
            # Dynamo can follow this and show the message; it cannot build our own exception.
            wanted = f"{name}: argument '{param.name}': expected None in a compiled function"
            lines += [
                f"    if {param.name} is not None:",
                f"        raise _ValueError({wanted + ' (pass seed=)'!r})",
            ]
    arguments = ", ".join(f"{n}={n}" for n in spec.signature.parameters)
    if any(p.role == "in_place" for p in spec.params):
        # Torch has no derivative of an opaque op that writes in place; that of the reference,
        # traced through, is right.
        tensors = [p.name for p in spec.params if p.role in ("input", "in_place") and p.is_tensor]
        needs = " or ".join(f"({n} is not None and {n}.requires_grad)" for n in tensors)
        no_derivative = f"{name}: in a compiled function only 'reference' has a derivative"
        lines += [
            f"    if _grad_enabled() and ({needs}):",
            f"        if {on!r} not in ('', 'reference'):",
            f"            raise _ValueError({no_derivative!r})",
            f"        return _reference({arguments})",
        ]
    lines.append(f"    _result = _op({_flatten_source(spec)}, {on!r})")
    if any(p.role == "output" for p in spec.params):
        wanted = f"{name}: argument 'out': expected the shape, dtype and device of the result"
        lines += [
            "    if out is not None:",
            "        if out.shape != _result.shape or out.dtype != _result.dtype "
            "or out.device != _result.device:",
            f"            raise _ValueError({wanted!r})",
            "        out.copy_(_result)",
            "        return out",
        ]
    if spec.finish:
        lines.append(f"    return _finish(_bind({arguments}), _result)")
    elif spec.num_outputs:
        lines.append("    return _result")

    namespace = {
        "_op": getattr(getattr(torch.ops, NAMESPACE), name).default,
        "_policy": policy,
        "_Tensor": torch.Tensor,
        "_isinstance": isinstance,
        "_ValueError": ValueError,
        "_AssertionError": AssertionError,
        "_bind": spec.bind,
        "_finish": spec.finish,
        "_reference": spec.reference,
        "_grad_enabled": torch.is_grad_enabled,
    }
    return compiled_function("\n".join(lines), f"{name}_traced", namespace, spec)


def compiled_function(
    source: str, name: str, namespace: dict[str, Any], spec: OpSpec
) -> Callable[..., Any]:
    """Run generated source; returns the function it defines, whose lines tracebacks can show as
    long as it lives."""
    import linecache

    filename = f"<kernelhub {name} {id(namespace):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    parameters = spec.signature.parameters
    namespace["_defaults"] = {n: p.default for n, p in parameters.items()}
    exec(compile(source, filename, "exec"), namespace)
    made: Callable[..., Any] = namespace[name]
    weakref.finalize(made, linecache.cache.pop, filename, None)
    return made


def register(spec: OpSpec, run: Callable[[str], Callable[..., Any]]) -> None:
    """Define the torch op of a spec. `run(backend)` gives the function to call when it runs."""
    name = spec.name
    names = _flat_names(spec)
    for twice in {n for n in names if [*names, "backend"].count(n) > 1}:
        raise RegistrationError(f"op '{name}': its torch op would have two parameters '{twice}'")
    splits = {p.name for p in spec.params if _split(p)}

    def unflatten(values: tuple[Any, ...]) -> dict[str, Any]:
        given = dict(zip(names, values, strict=True))
        for split in splits:
            tensor = given.pop(f"{split}_tensor")
            given[split] = given[split] if tensor is None else tensor
        return given

    def call(*values: Any) -> Any:
        return run(values[-1])(**unflatten(values[:-1]))

    def fake(*values: Any) -> Any:
        args = spec.bind(**unflatten(values[:-1]))
        spec.validate(args)
        made = tuple(desc.empty() for desc in spec.outputs(args))
        return made[0] if spec.num_outputs == 1 else made if made else None

    library = _libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
    tags = [torch.Tag.nondeterministic_seeded] if spec.random else []
    library.define(name + schema(spec), tags=[torch.Tag.pt2_compliant_tag, *tags])
    library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if spec.differentiable:
        _register_backward(spec, library, names, unflatten)


def unregister(name: str) -> None:
    library = _libraries.pop(name, None)
    if library is not None:
        library._destroy()


def _register_backward(
    spec: OpSpec,
    library: torch.library.Library,
    names: list[str],
    unflatten: Callable[[tuple[Any, ...]], dict[str, Any]],
) -> None:
    """Backward of the torch op: the reference's, recomputed inside an opaque op of its own."""
    backward = f"{spec.name}_backward"
    inputs = schema(spec).rsplit(" -> ", 1)[0].strip("()")
    library.define(f"{backward}(Tensor grad, bool[] wanted, {inputs}) -> Tensor[]")

    def run(grad: torch.Tensor, wanted: list[bool], *values: Any) -> list[torch.Tensor]:
        with torch.enable_grad():
            leaves = [
                v.detach().requires_grad_() if want else v
                for v, want in zip(values, wanted, strict=True)
            ]
            result = spec.reference(**unflatten(tuple(leaves[:-1])))
            asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
            grads = torch.autograd.grad(result, asked, grad, allow_unused=True)
        return [
            torch.zeros_like(leaf) if g is None else g.clone(memory_format=torch.contiguous_format)
            for leaf, g in zip(asked, grads, strict=True)
        ]

    def fake(grad: torch.Tensor, wanted: list[bool], *values: Any) -> list[torch.Tensor]:
        return [
            torch.empty(v.shape, dtype=v.dtype, device=v.device)
            for v, want in zip(values, wanted, strict=True)
            if want
        ]

    library.impl(backward, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{backward}", fake, lib=library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        places = [i for i, v in enumerate(inputs) if isinstance(v, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in places))
        ctx.places = places
        ctx.rest = [None if isinstance(v, torch.Tensor) else v for v in inputs]

    def differentiate(ctx: Any, grad: torch.Tensor) -> Any:
        values = list(ctx.rest)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            values[place] = tensor
        wanted = [bool(need) for need in ctx.needs_input_grad]
        op = getattr(getattr(torch.ops, NAMESPACE), backward).default
        grads = iter(op(grad, wanted, *values))
        return tuple(next(grads) if want else None for want in wanted)

    torch.library.register_autograd(
        f"{NAMESPACE}::{spec.name}", differentiate, setup_context=setup_context, lib=library
    )
