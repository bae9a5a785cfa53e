"""The emulator reports every planted fault of a kernel, and its own checks catch faults in it.

The kernels are in `emulator/checks.mu`. Each line there that breaks a rule ends in `HERE name`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).parent.parent
HOST = ROOT / "csrc" / "vendor" / "host"
CHECKS = Path(__file__).parent / "emulator" / "checks.mu"

SANITIZERS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DKH_SIMT_SERIAL"),
    "thread": ("-fsanitize=thread",),
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def compiled(host: Path, output: Path, warp: int, kind: str, compiler: str = "g++") -> Path:
    optimised = (
        ("-O0",) if kind == "plain" else ("-O1", "-g")
    )  # the first compiles in half the time
    command = [
        *(compiler, "-std=c++17", *optimised, "-fno-gnu-unique", "-ffp-contract=off"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
        *("-Wno-free-nonheap-object", "-pthread", f"-DKH_SIMT_WARP_SIZE={warp}"),
        *(*SANITIZERS[kind], f"-I{host}", "-x", "c++", str(CHECKS)),
        *(str(host / "exports.cpp"), str(host / "switch.cpp"), "-o", str(output)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    made: dict[tuple[int, str], Path] = {}
    folder = tmp_path_factory.mktemp("emulator")

    def get(warp: int, kind: str) -> Path:
        if (warp, kind) not in made:
            made[warp, kind] = compiled(HOST, folder / f"checks-{warp}-{kind}", warp, kind)
        return made[warp, kind]

    return get


def output_of(program: Path, name: str, *before: str) -> tuple[int, str]:
    options = "halt_on_error=0:detect_leaks=0:exitcode=66:detect_stack_use_after_return=0"
    environment = {**os.environ, "ASAN_OPTIONS": options, "TSAN_OPTIONS": "exitcode=66"}
    run = subprocess.run(
        [*before, str(program), name],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    return run.returncode, run.stdout + run.stderr


def place(name: str) -> str:
    """`checks.mu:LINE` of a kernel's fault."""
    lines = CHECKS.read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"// HERE {name}"))
    return f"checks.mu:{number}"


@pytest.mark.parametrize("kind", SANITIZERS)
@pytest.mark.parametrize("warp", [32, 128])
def test_everything_is_as_told(checks: Callable[[int, str], Path], warp: int, kind: str) -> None:
    """Good kernels run clean, under the sanitizers too; broken ones are refused."""
    code, said = output_of(checks(warp, kind), "all")
    assert code == 0, said
    assert said.strip() == "0 wrong"


REFUSED = (
    *("barrier_for_some", "two_barriers", "barrier_after_exit", "shuffle_for_some"),
    *("shuffle_after_exit", "two_shuffles", "masks_differ", "not_in_its_mask"),
    *("reads_outside_its_mask", "mixed_waits", "odd_width", "spins"),
)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("warp", [32, 128])
def test_a_refusal_names_the_line(checks: Callable[[int, str], Path], warp: int, name: str) -> None:
    code, said = output_of(checks(warp, "plain"), name)
    assert code == 1
    assert place(name) in said


REPORTED = {
    "past_global": ("address", "heap-buffer-overflow"),
    "past_static_shared": ("address", "index 64 out of bounds"),
    "past_dynamic_shared": ("address", "heap-buffer-overflow"),
    "misaligned": ("address", "misaligned address"),
    "overflows": ("address", "signed integer overflow"),
    "missing_barrier": ("thread", "data race"),
    "blocks_race": ("thread", "data race"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_sanitizer_names_the_line(checks: Callable[[int, str], Path], name: str) -> None:
    kind, text = REPORTED[name]
    code, said = output_of(checks(32, kind), name)
    assert code != 0
    assert text in said
    assert place(name) in said


@pytest.mark.parametrize("name", ["reverses", "reverses_often", "half_a_warp"])
def test_the_race_check_is_quiet_about_good_kernels(
    checks: Callable[[int, str], Path], name: str
) -> None:
    code, said = output_of(checks(128, "thread"), name)
    assert code == 0, said
    assert "WARNING" not in said


def test_a_stack_that_overflows_is_a_fault(checks: Callable[[int, str], Path]) -> None:
    code, _ = output_of(checks(32, "plain"), "deep_stack")
    assert code < 0  # ended by a signal; the neighbour's stack is whole


@pytest.mark.parametrize("warp", [32, 128])
def test_on_a_64_bit_arm(tmp_path: Path, warp: int) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip(f"{compiler} or qemu-aarch64 is not installed")
    program = compiled(HOST, tmp_path / "checks", warp, "plain", compiler)
    code, said = output_of(program, "all", emulator, "-L", "/usr/aarch64-linux-gnu")
    assert code == 0, said


# ---- the emulator's own faults ---------------------------------------------------------------


@attrs.frozen
class Fault:
    """Replace `old` by `new` in a file of the emulator; `noticed_by` is the check that fails."""

    name: str
    file: str
    old: str
    new: str
    noticed_by: str


FAULTS = (
    Fault("barrier-does-not-wait", "simt/block.h", "if (++barrier_waiting_ == count_)",
          "if (barrier_waiting_ = 0; true)", "reverses"),
    Fault("barrier-opens-early", "simt/block.h", "if (++barrier_waiting_ == count_)",
          "if (++barrier_waiting_ >= count_ - 1)", "reverses"),
    Fault("barrier-loses-a-count", "simt/block.h", "barrier_sum_ += addend",
          "barrier_sum_ = addend", "counts"),
    Fault("shuffle-off-by-one-lane", "kh_vendor.h",
          "memcpy(&value, c->values[source], sizeof(T))",
          "memcpy(&value, c->values[source ^ 1], sizeof(T))", "shuffles"),
    Fault("shuffle-ignores-its-width", "kh_vendor.h", "return running_thread->lane / width * width",
          "return 0", "shuffles"),
    Fault("collective-releases-early", "simt/block.h", "if (c->arrived == c->expected) {",
          "if (c->arrived != 0) {", "shuffles"),
    Fault("vote-forgets-a-lane", "kh_vendor.h", "lane < kWarp; ++lane)",
          "lane < kWarp - 1; ++lane)", "shuffles"),
    Fault("exited-lanes-forgotten", "simt/block.h", "exited_[t.warp] |= lane_bit(t.lane)",
          "exited_[t.warp] |= 0", "shuffle_after_exit"),
    Fault("places-not-compared", "simt/block.h", "} else if (!(barrier_at_ == at)) {",
          "} else if (false) {", "two_barriers"),
    Fault("masks-not-compared", "simt/block.h", "} else if (c->expected != expected) {",
          "} else if (false) {", "masks_differ"),
    Fault("shared-memory-not-poisoned", "simt/block.h",
          "if (shared_) memset(shared_.get(), 0xff, launch_->shared_bytes)", "", "reads_unwritten"),
    Fault("order-not-reversed", "simt/launch.h", "std::reverse(order.begin(), order.end())",
          "(void)0", "reverse"),
    Fault("seed-ignored", "simt/launch.h", "std::mt19937_64(options.seed)", "std::mt19937_64(1)",
          "random"),
    Fault("a-block-left-out", "simt/launch.h", "number = next++;",
          "number = next++ + (blocks > 40);", "adds_up"),
    Fault("block-index-mixed-up", "simt/block.h", "unsigned(number / g.x % g.y)",
          "unsigned(number / g.y % g.x)", "notes_indices"),
    Fault("watchdog-asleep", "simt/launch.h", "launch->expired = true", "(void)launch", "spins"),
    Fault("stream-not-kept", "simt/launch.h", "                       stream,\n",
          "                       stream ? nullptr : stream,\n", "last launch"),
    Fault("device-not-restored", "kh_vendor.h", "simt::current_device = before_;", "", "device"),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_of_the_emulator_is_noticed(fault: Fault, tmp_path: Path) -> None:
    host = tmp_path / "host"
    shutil.copytree(HOST, host)
    path = host / fault.file
    source = path.read_text()
    assert source.count(fault.old) == 1, source.count(fault.old)
    path.write_text(source.replace(fault.old, fault.new))
    code, said = output_of(compiled(host, tmp_path / "checks", 32, "plain"), "all")
    assert code != 0
    assert f"WRONG {fault.noticed_by}" in said or code < 0, said
