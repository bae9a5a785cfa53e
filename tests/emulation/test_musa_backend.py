"""The `musa` backend, from a tensor on a musa device to the kernel's result."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
import torch

import kernelhub
from kernelhub import doctor, plugins, registry
from kernelhub.backends.musa import backend
from kernelhub.backends.native import abi, library
from kernelhub.errors import ArgumentError, BackendUnavailable, FallbackWarning, KernelError
from kernelhub.spec import Case
from kernelhub.testing import run_case
from tests.last_launch import LastLaunch

DEVICES = ("musa:0", "musa:1")
CASES = [(op, case) for op in abi.OPS for case in registry.spec(op).cases()]

mul_add = kernelhub.ops.fused_mul_add
rotary = kernelhub.ops.rotary_embedding


def last_launch(device: str = "musa:0") -> LastLaunch:
    found = LastLaunch()
    loaded = backend.kernels.library(torch.device(device))
    loaded.function("kh_simt_last_launch")(ctypes.byref(found))
    return found


@pytest.fixture(params=["compiled", "ctypes"])
def binding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to call a kernel."""
    if request.param == "ctypes":
        monkeypatch.setattr(library, "fast_binding", lambda: None)
    else:
        assert library.fast_binding() is not None, library.why_not_fast()
    _forget_launchers()
    yield request.param
    _forget_launchers()


def _forget_launchers() -> None:
    for implementation in backend.implementations:
        prepare: Any = implementation.prepare
        (launchers,) = (
            cell.cell_contents
            for cell in prepare.__closure__
            if hasattr(cell.cell_contents, "_kernels")
        )
        launchers.clear()
    with registry.lock:
        registry.notify()  # drops what is prepared, which holds launchers


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}-{case.name}" for op, case in CASES])
@pytest.mark.parametrize("device", DEVICES)
def test_case(op: str, case: Case, device: str) -> None:
    outcome = run_case(op, case, "musa", device)
    assert outcome.status == "passed", outcome.message


@pytest.mark.parametrize("name", ["llama-3-8b-t1-bf16", "token-gap", "offsets-batch"])
def test_both_bindings(binding: str, name: str) -> None:
    case = next(c for c in registry.spec("rotary_embedding").cases() if c.name == name)
    assert run_case("rotary_embedding", case, "musa", "musa:1").status == "passed"
    case = next(c for c in registry.spec("fused_mul_add").cases() if c.name == "broadcast")
    assert run_case("fused_mul_add", case, "musa", "musa:0").status == "passed"


def test_musa_is_chosen_by_the_device() -> None:
    x = torch.ones(3, 5, device="musa")
    selection = mul_add.explain(x, x, 2.0)
    assert selection.backend == "musa"
    before = last_launch().count
    assert mul_add(x, x, 2.0).cpu().eq(3.0).all()
    assert last_launch().count == before + 1


def test_the_architecture_is_the_devices_own() -> None:
    warps = [backend.kernels.library(torch.device(d)).warp_size for d in DEVICES]
    assert warps == [32, 128]


@pytest.mark.parametrize("index", [0, 1])
def test_the_stream_and_device_are_torchs(binding: str, index: int) -> None:
    x = torch.ones(4, device=f"musa:{index}")
    assert torch.musa.current_device() == 0
    mul_add(x, x, 2.0)
    assert last_launch(f"musa:{index}").device == index
    assert not last_launch(f"musa:{index}").stream  # the default stream
    stream = torch.musa.Stream(device=index)
    with torch.musa.stream(stream):
        mul_add(x, x, 2.0)
    assert stream.musa_stream != 0
    assert last_launch(f"musa:{index}").stream == stream.musa_stream
    assert torch.musa.current_device() == 0


def test_each_thread_has_its_own_stream(binding: str) -> None:
    x = torch.ones(4, device="musa")
    seen: list[tuple[int, int]] = []

    def work() -> None:
        stream = torch.musa.Stream()
        with torch.musa.stream(stream):
            mul_add(x, x, 2.0)
            seen.append((stream.musa_stream, last_launch().stream or 0))

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len({handle for handle, _ in seen}) == 3
    assert all(handle == used for handle, used in seen)


def test_one_launch_for_query_and_key_and_none_for_nothing(binding: str) -> None:
    query, key = torch.ones(3, 4, 8, device="musa"), torch.ones(3, 2, 8, device="musa")
    cache = torch.ones(5, 8, device="musa")
    positions = torch.zeros(3, dtype=torch.int64, device="musa")
    before = last_launch().count
    rotary(positions, query, key, 8, cache)
    assert last_launch().count == before + 1
    rotary(positions[:0], query[:0], key[:0], 8, cache)
    rotary(positions, query, key, 8, cache[:0])
    assert mul_add(query[:, :0], query[:, :0], 2.0).shape == (3, 0, 8)
    assert last_launch().count == before + 1


def test_the_launch_is_sized_from_both_tensors() -> None:
    for heads, blocks in (((1, 1), 1), ((8, 1), 3), ((1, 8), 3), ((9, 8), 5)):  # of 4 heads each
        query, key = (torch.ones(2, n, 128, device="musa") for n in heads)
        rotary(
            torch.zeros(2, dtype=torch.int32, device="musa"),
            query,
            key,
            128,
            torch.ones(5, 128, device="musa")[:, ::1],
        )
        assert list(last_launch().grid) == [blocks, 2, 1], heads


def test_autograd_notices_what_a_kernel_wrote() -> None:
    query = torch.ones(3, 4, 8, device="musa")
    weight = torch.ones(3, 4, 8, device="musa", requires_grad=True)
    product = (weight * query).sum()
    cache, positions = torch.ones(5, 8, device="musa"), torch.zeros(3, dtype=torch.int64).to("musa")
    with torch.no_grad():
        rotary(positions, query, None, 8, cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    out = torch.ones(3, 4, 8, device="musa")
    product = (weight * out).sum()
    with torch.no_grad():
        mul_add(query, query, 2.0, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        query = torch.ones(3, 4, 8, device="musa")
        positions = torch.zeros(3, dtype=torch.int64, device="musa")
        rotary(positions, query, None, 8, torch.zeros(5, 8, device="musa"))
        assert not query.cpu().any()


@pytest.mark.filterwarnings("ignore:fused_mul_add on musa")
def test_a_gradient_goes_through_the_reference() -> None:
    x = torch.ones(3, device="musa", requires_grad=True)
    assert mul_add.explain(x, x, 2.0).backend == "reference"
    mul_add(x, x.detach(), 2.0).sum().backward()
    assert x.grad is not None
    assert x.grad.cpu().eq(2.0).all()


def test_forced_backends() -> None:
    x = torch.ones(3, device="musa")
    before = last_launch().count
    with kernelhub.use("reference"):
        assert mul_add(x, x, 2.0).cpu().eq(3.0).all()
    assert last_launch().count == before
    with kernelhub.use("cuda"), pytest.raises(BackendUnavailable, match="runs on cuda"):
        mul_add(x, x, 2.0)
    with pytest.raises(BackendUnavailable, match="runs on musa; the tensors are on cpu"):
        mul_add.on("musa")(x.cpu(), x.cpu(), 2.0)


@pytest.fixture
def without_gemv() -> Iterator[None]:
    """The backend as if it had no kernel for fused_gemv."""
    fewer = tuple(made for made in backend.implementations if made.op != "fused_gemv")
    registry.remove_backend("musa")
    registry.add_backend(attrs.evolve(backend, implementations=fewer), shipped=True)
    yield
    registry.remove_backend("musa")
    registry.add_backend(backend, shipped=True)


def test_an_op_without_a_kernel_falls_back_aloud(without_gemv: None) -> None:
    x = torch.ones(1, 4, device="musa")
    with pytest.warns(FallbackWarning, match="musa: does not implement fused_gemv"):
        y = kernelhub.ops.fused_gemv(x, torch.ones(3, 4, device="musa"))
    assert y.cpu().eq(4.0).all()


WRONG: dict[str, Callable[[], Any]] = {
    "bias": lambda: mul_add(torch.ones(3, device="musa:0"), torch.ones(3, device="musa:1"), 2.0),
    "x": lambda: mul_add(
        torch.ones(3, device="musa"), torch.ones(3, device="musa"), 2.0, out=torch.ones(3)
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mixed_devices_are_an_error(name: str) -> None:
    with pytest.raises(ArgumentError, match="a tensor on musa:0"):
        WRONG[name]()


def test_a_planned_call_stays_in_its_tensors(binding: str) -> None:
    """A plan skips the checks of a call; the kernel's own keep it from reading elsewhere."""
    x = torch.ones(3, 5, device="musa")
    run = mul_add.plan(x, x, 2.0)
    assert run(x, x).cpu().eq(3.0).all()
    for other in (torch.ones(4, 5).to("musa"), x.double(), x.cpu(), x.to("musa:1")):
        with pytest.raises((KernelError, RuntimeError)):
            run(x, other)
    with pytest.raises(TypeError, match="expected a tensor"):
        _launcher()(x, 1, None, x, 2.0)
    query = torch.ones(3, 4, 8, device="musa")
    positions = torch.zeros(3, dtype=torch.int64, device="musa")
    planned = rotary.plan(positions, query, None, 8, torch.ones(5, 8, device="musa"))
    for call in ((positions[:2], query), (positions.int().float(), query), (positions, query[0])):
        with pytest.raises((KernelError, RuntimeError)):
            planned(*call, None)


def _launcher() -> Any:
    return backend.kernels.library(torch.device("musa:0")).launcher(
        "fused_mul_add", "musa", backend.kernels.stream_of
    )


def test_compiled() -> None:
    x, bias = torch.randn(4, 6), torch.randn(4, 6)

    def layer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return mul_add(a + 1, b, 2.0) * 3

    before = last_launch().count
    for mode in ("eager", "aot_eager"):
        with torch.no_grad():
            got = torch.compile(layer, fullgraph=True, backend=mode)(x.to("musa"), bias.to("musa"))
        torch.testing.assert_close(got.cpu(), layer(x, bias))
    assert last_launch().count == before + 2


def test_doctor_sees_the_devices_and_the_backend() -> None:
    report = doctor.examine()
    names = {device.name: device.detail for device in report.devices if device.usable}
    assert "capability 3.1" in names["musa:0"]
    assert "capability 2.2" in names["musa:1"]
    assert next(b for b in report.backends if b.name == "musa").state == "usable"


def test_an_absent_device_is_a_reason() -> None:
    plugins.load()
    reasons = registry.unavailable(backend, torch.device("musa:7"))
    assert reasons == ("there is no musa:7: torch.musa finds 2",)
