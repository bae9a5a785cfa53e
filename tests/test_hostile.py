"""Random abuse of every op: a call gives the defined result or an ArgumentError, nothing else."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

import kernelhub
from kernelhub import ArgumentError, contracts, registry
from kernelhub.spec import Case, OpSpec, Param
from kernelhub.testing import compare
from kernelhub.testing.harness import Buffers

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]
ODD_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    127,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.0,
    -0.0,
    0.5,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    1e-300,
    "",
    "auto",
    "swiglu",
    "relu",
    b"x",
    (),
    [1.0],
    {},
    object,
    torch.float32,
    torch.float16,
    torch.int32,
    torch.Generator(),
    torch.device("cpu"),
]
ODD_INTS = [0, 1, -1, 2, 7, 127, 128, 255, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63)]
ODD_FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, 2.0**-24]


@functools.cache
def small_cases(op: str) -> list[Case]:
    def weight(case: Case) -> int:
        tensors = [v for v in case.arguments().values() if isinstance(v, Tensor)]
        return sum(t.numel() for t in tensors)

    return [c for c in registry.spec(op).cases() if weight(c) <= 20_000]


def redtype(draw: Any, t: Tensor) -> Tensor:
    return t.to(draw(st.sampled_from(DTYPES)))


def resize(draw: Any, t: Tensor) -> Tensor:
    if t.ndim == 0:
        return t
    dim = draw(st.integers(0, t.ndim - 1))
    size = draw(st.sampled_from([0, 1, t.shape[dim] - 1, t.shape[dim] + 1, 2 * t.shape[dim]]))
    index = torch.arange(max(size, 0)) % max(t.shape[dim], 1)
    return t.index_select(dim, index) if t.shape[dim] else t.new_zeros(())


def rerank(draw: Any, t: Tensor) -> Tensor:
    return draw(
        st.sampled_from(
            [
                t.flatten(),
                t.unsqueeze(0),
                t.unsqueeze(-1),
                t.reshape(-1)[:1].squeeze() if t.numel() else t,
            ]
        )
    )


def restride(draw: Any, t: Tensor) -> Tensor:
    if t.ndim == 0:
        return t
    choices = [
        t.t().contiguous().t() if t.ndim == 2 else t,
        torch.stack([t, t], -1)[..., 0],
        t[:1].expand_as(t) if t.shape[0] else t,
        torch.cat([t.flatten(), t.flatten()[:1]])[1:].view(t.shape) if t.numel() else t,
        torch.zeros_like(t).set_(t) if t.is_contiguous() else t,
    ]
    return draw(st.sampled_from(choices))


def relocate(draw: Any, t: Tensor) -> Any:
    return draw(st.sampled_from([t.to("meta"), t.to_sparse() if t.dtype == torch.float32 else t]))


def poison(draw: Any, t: Tensor) -> Tensor:
    if t.numel() == 0 or t.dtype in (torch.bool, torch.complex64):
        return t
    values = ODD_FLOATS if t.dtype.is_floating_point else ODD_INTS
    value = draw(st.sampled_from(values))
    if not t.dtype.is_floating_point:
        info = torch.iinfo(t.dtype)
        value = min(max(value, info.min), info.max)
    flat = t.clone(memory_format=torch.contiguous_format).flatten()
    place = draw(st.integers(0, t.numel() - 1))
    flat[place] = value
    return flat.view(t.shape)


def grad(draw: Any, t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_() if t.dtype.is_floating_point else t


TENSOR_ABUSE = (redtype, resize, rerank, restride, relocate, poison, poison, grad)


def abuse(draw: Any, spec: OpSpec, arguments: dict[str, Any]) -> str:
    """Change one argument in place; returns its name."""
    param: Param = draw(st.sampled_from(spec.params))
    value = arguments.get(param.name)
    if isinstance(value, Tensor) and (value.is_meta or value.is_sparse):
        return param.name
    if isinstance(value, Tensor) and draw(st.integers(0, 9)):
        arguments[param.name] = draw(st.sampled_from(TENSOR_ABUSE))(draw, value)
    elif param.role == "output" and draw(st.booleans()):
        tensors = [v for v in arguments.values() if isinstance(v, Tensor)]
        arguments[param.name] = draw(st.sampled_from(tensors))
    elif param.choices and draw(st.booleans()):
        arguments[param.name] = draw(st.sampled_from(param.choices))
    elif draw(st.booleans()):
        tensors = [v for v in arguments.values() if isinstance(v, Tensor)]
        arguments[param.name] = draw(st.sampled_from([*tensors, *ODD_VALUES]))
    else:
        arguments[param.name] = draw(st.sampled_from(ODD_VALUES))
    return param.name


@pytest.mark.parametrize("op", contracts.NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")
@given(data=st.data())
def test_abuse(op: str, data: st.DataObject) -> None:
    spec = registry.spec(op)
    case = data.draw(st.sampled_from(small_cases(op)), label="case")
    arguments = case.arguments(data.draw(st.integers(0, 3)))
    for _ in range(data.draw(st.integers(0, 3), label="changes")):
        note(f"changed {abuse(data.draw, spec, arguments)}")
    note(str({k: getattr(v, "shape", v) for k, v in arguments.items()}))
    if any(
        p.name not in arguments and p.default is p.empty for p in spec.signature.parameters.values()
    ):
        return
    if any(isinstance(v, Tensor) and v.is_meta for v in arguments.values()):
        with pytest.raises(ArgumentError) if _mixed(spec, arguments) else _nothing():
            kernelhub.op(op)(**arguments)
        return
    try:
        # Results that depend on a generator's state have no oracle.
        before = Buffers(_detached(arguments), CPU).arguments
        result = kernelhub.op(op)(**arguments)
    except ArgumentError as error:
        assert error.op == op
        assert error.argument in spec.signature.parameters
        return
    if spec.random and before.get("seed") is None:
        return
    returned = result if isinstance(result, tuple) else () if result is None else (result,)
    in_place = [
        arguments[p.name]
        for p in spec.params
        if p.role == "in_place" and arguments.get(p.name) is not None
    ]
    truth = spec.oracle(spec.bind(**before), None)
    assert len(truth) == len(returned) + len(in_place)
    for expected, got in zip(truth, (*returned, *in_place), strict=True):
        assert compare(expected, got) <= 1, expected.name


def _detached(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _mixed(spec: OpSpec, arguments: dict[str, Any]) -> bool:
    kinds = {v.device.type for v in arguments.values() if isinstance(v, Tensor)}
    return len(kinds) > 1


class _nothing:  # noqa: N801
    """A call on meta tensors alone: shapes without data. It may give shapes or an ArgumentError."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, (ArgumentError, NotImplementedError, RuntimeError))
