"""What the emulated `torch.musa` and torch_musa offer: devices, streams, generators."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from tests.emulation import musa

DEVICES = ["musa:0", "musa:1"]


@pytest.fixture(autouse=True)
def current_device_stays() -> Any:
    yield
    assert torch.musa.current_device() == 0
    assert torch.musa.current_stream(0).musa_stream == torch.musa.current_stream(1).musa_stream == 0


# ---- devices ---------------------------------------------------------------------------------


def test_module() -> None:
    assert torch.musa.is_available()
    assert torch.musa.device_count() == 2
    assert [torch.musa.get_device_capability(i) for i in range(2)] == [(3, 1), (2, 2)]
    assert torch.musa.get_device_capability() == (3, 1)
    assert torch.musa.get_device_name("musa:1") == "Emulated MTT S4000"
    assert torch.version.musa == "5.2 (emulated)"
    assert torch.accelerator.current_accelerator() == torch.device("musa")
    assert torch.get_device_module("musa") is torch.musa


def test_torch_musa_can_be_found() -> None:
    import torch_musa

    assert importlib.util.find_spec("torch_musa") is not None
    assert torch_musa.__version__
    assert torch_musa._MUSAC._musa_getCurrentRawStream(1) == 0


def test_install_again_changes_nothing() -> None:
    before = torch.musa
    assert musa.install() is before is torch.musa


def test_current_device() -> None:
    with torch.musa.device(1):
        assert torch.musa.current_device() == 1
        assert torch.empty(1, device="musa").device.index == 1
        assert (torch.empty(1, device="musa:0") + 1).device.index == 0
        with torch.musa.device("musa:0"):
            assert torch.musa.get_device_capability() == (3, 1)
        assert torch.musa.get_device_capability() == (2, 2)
        with torch.musa.device(None):
            assert torch.musa.current_device() == 1
    torch.musa.set_device("musa:1")
    assert torch.musa.current_device() == torch.accelerator.current_device_index() == 1
    torch.musa.set_device(0)


@pytest.mark.parametrize("device", [2, -1, "musa:5"])
def test_there_are_only_two_devices(device: Any) -> None:
    with pytest.raises(RuntimeError, match="there is no device"):
        torch.musa.set_device(device)
    with pytest.raises(RuntimeError, match="there is no device"):
        torch.empty(1, device="musa:2")


# ---- streams ---------------------------------------------------------------------------------


def test_streams() -> None:
    import torch_musa

    raw = torch_musa._MUSAC._musa_getCurrentRawStream
    first, second = torch.musa.Stream(), torch.musa.Stream(device="musa:1")
    handles = {0, first.musa_stream, second.musa_stream}
    assert len(handles) == 3
    assert (first.device, second.device) == (torch.device("musa:0"), torch.device("musa:1"))
    with torch.musa.stream(second):
        assert torch.musa.current_device() == 1
        assert torch.musa.current_stream() == second
        assert torch.musa.current_stream(1).musa_stream == raw(1) == second.musa_stream
        assert torch.musa.current_stream("musa:0").musa_stream == raw(0) == 0
        with torch.musa.stream(first):
            assert (torch.musa.current_device(), raw(0)) == (0, first.musa_stream)
        assert torch.musa.current_device() == 1
        with torch.musa.stream(None):
            assert torch.musa.current_stream() == second
    assert torch.musa.default_stream(1).musa_stream == raw(1) == 0


def test_set_stream() -> None:
    stream = torch.musa.Stream(device=1)
    torch.musa.set_stream(stream)
    assert torch.accelerator.current_stream(1).stream_id == stream.stream_id
    assert torch.musa.current_device() == 1
    torch.musa.set_stream(torch.musa.default_stream(1))
    torch.musa.set_device(0)


def test_streams_of_torch_itself() -> None:
    with torch.musa.Stream(device="musa:1") as stream:
        assert torch.musa.current_stream(1) == stream
    start, end = torch.musa.Event(enable_timing=True), torch.musa.Event(enable_timing=True)
    start.record()
    torch.ones(10, device="musa").record_stream(torch.musa.current_stream())
    end.record()
    end.synchronize()
    torch.musa.synchronize()
    assert start.elapsed_time(end) > 0
    assert torch.musa.current_stream().query()


def test_threads_have_current_devices_of_their_own() -> None:
    seen: list[int] = []
    with torch.musa.device(1), torch.musa.stream(torch.musa.Stream()):
        thread = threading.Thread(
            target=lambda: seen.extend(
                [torch.musa.current_device(), torch.musa.current_stream(1).musa_stream]
            )
        )
        thread.start()
        thread.join()
    assert seen == [0, 0]


# ---- random numbers --------------------------------------------------------------------------


def _draw(device: str, generator: torch.Generator | None = None) -> list[float]:
    drawn: list[float] = torch.randn(4, device=device, generator=generator).tolist()
    return drawn


@pytest.mark.parametrize("device", DEVICES)
def test_generators_are_reproducible(device: str) -> None:
    generator = torch.Generator(device).manual_seed(5)
    assert generator.device == torch.device(device)
    state = generator.get_state()
    first, second = _draw(device, generator), _draw(device, generator)
    assert first != second
    generator.set_state(state)
    assert _draw(device, generator) == first
    assert _draw(device, torch.Generator(device).manual_seed(5)) == first
    assert _draw(device, torch.Generator(device).manual_seed(6)) != first
    twin = generator.clone_state()
    assert twin.device == generator.device
    assert _draw(device, twin) == _draw(device, generator) == second


def test_default_generators_are_seeded_by_torch() -> None:
    torch.manual_seed(7)
    first = [_draw(device) for device in DEVICES]
    assert [_draw(device) for device in DEVICES] != first
    torch.manual_seed(7)
    host = torch.randn(4)  # draws from a generator of its own
    assert [_draw(device) for device in DEVICES] == first
    torch.musa.manual_seed_all(7)
    assert torch.initial_seed() == torch.musa.initial_seed() == 7
    assert host.tolist() != torch.randn(4).tolist()
    assert [_draw(device) for device in DEVICES] == first


def test_one_device_is_seeded_alone() -> None:
    torch.musa.manual_seed_all(1)
    zero, one = _draw("musa:0"), _draw("musa:1")
    torch.musa.manual_seed(1)
    assert _draw("musa:0") == zero
    assert _draw("musa:1") != one
    state = torch.musa.get_rng_state("musa:1")
    again = _draw("musa:1")
    torch.musa.set_rng_state(state, "musa:1")
    assert _draw("musa:1") == again


def test_fork_rng_gives_the_state_back() -> None:
    torch.manual_seed(3)
    with torch.random.fork_rng(devices=[0, 1], device_type="musa"):
        inside = _draw("musa:1")
    assert _draw("musa:1") == inside


def test_generators_of_the_host_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'musa' device type for generator"):
        torch.empty(3, device="musa").normal_(generator=torch.Generator())


# ---- the process -----------------------------------------------------------------------------


def test_a_renamed_device_type_is_refused() -> None:
    program = (
        "import torch\n"
        "from tests.emulation import musa\n"
        "torch.utils.rename_privateuse1_backend('other')\n"
        "musa.install()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RuntimeError: torch already has the devices of a package for 'other'" in done.stderr
