"""The emulator inside libraries of one process: their sizes, states, threads and forks."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.last_launch import LastLaunch

ROOT = Path(__file__).parent.parent
HOST = ROOT / "csrc" / "vendor" / "host"
SOURCE = Path(__file__).parent / "emulator" / "library.mu"
THREADS = 64  # of a block

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


class Loaded:
    def __init__(self, path: Path) -> None:
        self.handle: Any = ctypes.CDLL(str(path))
        self.handle.error.restype = self.handle.kh_simt_error.restype = ctypes.c_char_p

    def configure(
        self, order: str = "forward", seed: int = 0, threads: int = 0, timeout_s: float = 0
    ) -> None:
        wrong = self.handle.kh_simt_configure(
            order.encode(), ctypes.c_uint64(seed), threads, ctypes.c_double(timeout_s)
        )
        assert not wrong, self.handle.kh_simt_error()

    def run(self, blocks: int = 1, rounds: int = 1, device: int = 0, stream: int = 0) -> list[int]:
        y = (ctypes.c_int * (blocks * THREADS))()
        code = self.handle.run(y, blocks, rounds, device, ctypes.c_void_p(stream))
        assert code == 0, self.handle.error()
        return list(y)

    def last_launch(self) -> LastLaunch:
        last = LastLaunch()
        self.handle.kh_simt_last_launch(ctypes.byref(last))
        return last


def expected(blocks: int, rounds: int = 1) -> list[int]:
    return (list(range(THREADS)) if rounds % 2 == 0 else list(range(THREADS))[::-1]) * blocks


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Loaded]]:
    folder = tmp_path_factory.mktemp("libraries")
    yield {warp: Loaded(compiled(folder, warp)) for warp in (32, 128)}


def compiled(folder: Path, warp: int) -> Path:
    library = folder / f"library{warp}.so"
    command = [
        *("g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"),
        *("-fno-gnu-unique", "-ffp-contract=off", "-pthread", f"-DKH_SIMT_WARP_SIZE={warp}"),
        *(f"-I{HOST}", "-x", "c++", str(SOURCE)),
        *(str(HOST / "exports.cpp"), str(HOST / "switch.cpp"), "-o", str(library)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return library


@pytest.fixture(params=[32, 128])
def library(libraries: dict[int, Loaded], request: pytest.FixtureRequest) -> Loaded:
    chosen = libraries[request.param]
    chosen.configure()
    return chosen


def test_much_static_shared_memory_loads_and_runs(library: Loaded) -> None:
    assert library.run(blocks=5) == expected(5)


def test_libraries_share_no_state(libraries: dict[int, Loaded]) -> None:
    narrow, wide = libraries[32], libraries[128]
    assert (narrow.handle.warp(), wide.handle.warp()) == (32, 128)
    before = wide.last_launch().count
    narrow.run(blocks=2, device=1, stream=0x1234)
    last = narrow.last_launch()
    assert (last.device, last.stream, *last.grid, *last.block) == (
        *(1, 0x1234),
        *(2, 1, 1),
        *(THREADS, 1, 1),
    )
    assert wide.last_launch().count == before
    narrow.configure(timeout_s=1e-9)
    assert wide.run() == expected(1)
    narrow.configure()


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_neither_order_nor_os_threads_change_results(
    library: Loaded, order: str, threads: int
) -> None:
    library.configure(order, seed=3, threads=threads)
    assert library.run(blocks=23, rounds=3) == expected(23, rounds=3)


def test_launches_from_many_threads_at_once(library: Loaded) -> None:
    library.configure(threads=2)
    before = library.last_launch().count
    results: list[list[int]] = []

    def launch() -> None:
        for _ in range(10):
            results.append(library.run(blocks=4, rounds=3))

    launchers = [threading.Thread(target=launch) for _ in range(6)]
    for launcher in launchers:
        launcher.start()
    for launcher in launchers:
        launcher.join()
    assert results == [expected(4, rounds=3)] * 60
    assert library.last_launch().count == before + 60


def test_errors_are_each_threads_own(library: Loaded) -> None:
    assert library.handle.run(None, 0, 1, 0, None) != 0
    there: list[bytes] = []
    other = threading.Thread(target=lambda: there.append(library.handle.error()))
    other.start()
    other.join()
    assert there == [b""]
    assert b"a grid of 0,1,1 blocks" in library.handle.error()


def test_a_time_limit_ends_a_long_launch(library: Loaded) -> None:
    library.configure(timeout_s=0.1)
    y = (ctypes.c_int * THREADS)()
    started = time.monotonic()
    assert library.handle.run(y, 1, 1 << 30, 0, None) != 0
    assert time.monotonic() - started < 30
    assert b"still running after 0.1 s, at __syncthreads (library.mu:" in library.handle.error()
    library.configure()
    assert library.run() == expected(1)


def in_child(library: Loaded) -> bool:
    """Whether a forked child can launch; one that hangs is ended."""
    child = os.fork()
    if child == 0:
        right = library.run(blocks=3) == expected(3)
        os._exit(0 if right else 1)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_amid_launches(library: Loaded) -> None:
    library.configure(threads=2)
    stop = threading.Event()

    def keep_launching() -> None:
        while not stop.is_set():
            library.run(blocks=2)

    launchers = [threading.Thread(target=keep_launching) for _ in range(2)]
    for launcher in launchers:
        launcher.start()
    try:
        assert all(in_child(library) for _ in range(50))
    finally:
        stop.set()
        for launcher in launchers:
            launcher.join()
    assert library.run(blocks=3) == expected(3)


# ---- conversions -------------------------------------------------------------------------------


def test_every_half_is_decoded_exactly(library: Loaded) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    decoded = np.empty(bits.size, np.float32)
    library.handle.decode_half(
        bits.ctypes.data_as(ctypes.c_void_p), decoded.ctypes.data_as(ctypes.c_void_p), bits.size
    )
    truth = bits.view(np.float16).astype(np.float32)
    assert np.array_equal(decoded, truth, equal_nan=True)
    assert np.array_equal(np.signbit(decoded), np.signbit(truth))


def test_floats_round_to_nearest_even(library: Loaded) -> None:
    random = np.random.default_rng(0)
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every_half = every_half[np.isfinite(every_half)]
    ties = (every_half[:-1] + every_half[1:]) / 2  # many lie halfway between neighbours
    anything = random.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    bf16_ties = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([every_half, ties, anything.view(np.float32), bf16_ties])
    half, bf16 = (np.empty(values.size, np.uint16) for _ in range(2))
    library.handle.encode(
        *(array.ctypes.data_as(ctypes.c_void_p) for array in (values, half, bf16)), values.size
    )
    source = torch.from_numpy(values)
    for found, dtype in ((half, torch.float16), (bf16, torch.bfloat16)):
        truth = source.to(dtype)
        encoded = torch.from_numpy(found.view(np.int16)).view(dtype)
        numbers = ~truth.isnan()
        assert torch.equal(encoded.isnan(), ~numbers)
        assert torch.equal(encoded.view(torch.int16)[numbers], truth.view(torch.int16)[numbers])
