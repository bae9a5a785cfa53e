"""The emulator reports every planted fault of a kernel, and its own checks catch faults in it.

The kernels are in `emulator/checks.mu`. Each line there that breaks a rule ends in `HERE name`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from filelock import FileLock

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
    # Without optimisation it compiles in half the time.
    optimised = ("-O0",) if kind == "plain" else ("-O1", "-g")
    command = [
        *(compiler, "-std=c++17", *optimised, "-fno-gnu-unique", "-ffp-contract=off"),
        "-fstack-clash-protection",
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
        *("-Wno-free-nonheap-object", "-pthread", f"-DKH_SIMT_WARP_SIZE={warp}"),
        # All as one unit: the headers are then read once.
        *(*SANITIZERS[kind], f"-I{host}", "-include", str(host / "exports.cpp")),
        *("-include", str(host / "switch.cpp"), "-x", "c++", str(CHECKS), "-o", str(output)),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output


@pytest.fixture(scope="session")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of this run, and of all its workers

    def get(warp: int, kind: str) -> Path:
        program = folder / f"checks-{warp}-{kind}"
        with FileLock(f"{program}.lock"):
            if not program.exists():
                compiled(HOST, program, warp, kind)
        return program

    return get


def output_of(program: Path, name: str, *before: str) -> tuple[int, str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",  # what a refused block leaves is lost
        "TSAN_OPTIONS": "exitcode=66",
    }
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


JUDGED = (
    *(("plain", 32, "all"), ("plain", 128, "all"), ("address", 32, "all")),
    ("thread", 128, "good"),  # not all: it takes a millisecond a GPU thread
)


@pytest.mark.parametrize(("kind", "warp", "which"), JUDGED)
def test_everything_is_as_told(
    checks: Callable[[int, str], Path], kind: str, warp: int, which: str
) -> None:
    """Good kernels run clean, under the sanitizers too; broken ones are refused."""
    code, said = output_of(checks(warp, kind), which)
    assert code == 0, said
    assert said.strip() == "0 wrong"


REFUSED = (
    *("barrier_for_some", "two_barriers", "barrier_after_exit", "shuffle_for_some"),
    *("shuffle_after_exit", "two_shuffles", "masks_differ", "not_in_its_mask"),
    *("reads_outside_its_mask", "mixed_waits", "odd_width", "wide_shuffle", "past_the_block"),
    *("matrix_unaligned", "matrix_odd_ldm", "matrix_of_two_pointers", "matrix_of_two_strides"),
    *("matrix_for_some", "matrix_of_a_few", "spins", "spins_on_an_atomic"),
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
    "matrix_past_shared": ("address", "heap-buffer-overflow"),
    "misaligned": ("address", "misaligned address"),
    "overflows": ("address", "signed integer overflow"),
    "missing_barrier": ("thread", "data race"),
    "blocks_race": ("thread", "data race"),
    "same_threads_race": ("thread", "data race"),
    "warps_race": ("thread", "data race"),
    "sums_unfenced": ("thread", "data race"),
    "shuffle_orders_nothing": ("thread", "data race"),
    "matrix_unsynced": ("thread", "data race"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_a_sanitizer_names_the_line(checks: Callable[[int, str], Path], name: str) -> None:
    kind, text = REPORTED[name]
    code, said = output_of(checks(128 if kind == "thread" else 32, kind), name)
    assert code != 0
    assert text in said
    assert place(name) in said


@pytest.mark.parametrize("name", ["reverses", "sums_fenced", "multiplies", "two_shuffles"])
def test_the_race_check_is_quiet(checks: Callable[[int, str], Path], name: str) -> None:
    """About good kernels, and about the emulator where it refuses one."""
    _, said = output_of(checks(128, "thread"), name)
    assert "ThreadSanitizer" not in said


def test_a_stack_that_overflows_is_a_fault(checks: Callable[[int, str], Path]) -> None:
    code, _ = output_of(checks(32, "plain"), "deep_stack")
    assert code == -signal.SIGSEGV  # the neighbour's stack is whole


def test_a_blind_spin_ends_the_process(checks: Callable[[int, str], Path]) -> None:
    code, said = output_of(checks(32, "plain"), "spins_blindly")
    assert code == -signal.SIGABRT
    assert "runs without a barrier, fence or atomic" in said


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
    warp: int = 32


FAULTS = (
    Fault("barrier-does-not-wait", "simt/block.h", "if (++barrier_waiting_ == count_)",
          "if (barrier_waiting_ = 0; true)", "reverses"),
    Fault("barrier-opens-early", "simt/block.h", "if (++barrier_waiting_ == count_)",
          "if (++barrier_waiting_ >= count_ - 1)", "reverses"),
    Fault("barrier-loses-a-count", "simt/block.h", "barrier_sum_ += addend",
          "barrier_sum_ = addend", "counts"),
    Fault("barrier-places-not-compared", "simt/block.h", "} else if (!(barrier_at_ == at)) {",
          "} else if (false) {", "two_barriers"),
    Fault("exited-lanes-forgotten", "simt/block.h", "exited_[t.warp] |= lane_bit(t.lane)",
          "exited_[t.warp] |= 0", "shuffle_after_exit"),
    Fault("collective-releases-early", "simt/block.h", "if (c->arrived == c->expected) {",
          "if (c->arrived != 0) {", "shuffles"),
    Fault("collective-places-not-compared", "simt/block.h", "} else if (!(c->at == at)) {",
          "} else if (false) {", "two_shuffles"),
    Fault("masks-not-told-apart", "simt/collectives.h", "c->pending && c->expected == expected",
          "c->pending && (c->expected & expected)", "meets_twice"),
    Fault("masks-count-from-the-first-lane", "simt/types.h",
          "Lanes{mask} << (lane / kGroup * kGroup)", "Lanes{mask} << (0 * lane)",
          "meets_twice", 128),
    Fault("callers-mask-unchecked", "simt/block.h", "if (!(lanes & lane_bit(thread->lane)))",
          "if (false)", "not_in_its_mask"),
    Fault("readers-forgotten", "simt/collectives.h", "!c->pending && c->readers == 0",
          "!c->pending", "shuffles"),
    Fault("shuffle-off-by-one-lane", "simt/sync.h", "c->values[source], sizeof(T)",
          "c->values[source ^ 1], sizeof(T)", "shuffles"),
    Fault("shuffle-ignores-its-width", "simt/sync.h", "return self()->lane / width * width",
          "return 0", "shuffles"),
    Fault("shuffle-reads-any-lane", "simt/sync.h", "if (!(c->arrived & lane_bit(source)))",
          "if (false)", "reads_outside_its_mask"),
    Fault("vote-forgets-a-lane", "simt/sync.h", "lane < kWarp; ++lane)",
          "lane < kWarp - 1; ++lane)", "shuffles"),
    Fault("ballot-of-the-first-group", "simt/sync.h", 'SIMT_HERE("__ballot_sync")) >> first',
          'SIMT_HERE("__ballot_sync")) >> 0 * first', "ballots", 128),
    Fault("matrix-forgets-the-addend", "simt/matrix.h", " + lanes[lane]->c[i]", "", "multiplies"),
    Fault("matrix-transposed", "simt/matrix.h", "b[n / kSide][n % kSide] = lanes",
          "b[n % kSide][n / kSide] = lanes", "multiplies"),
    Fault("matrix-of-a-lane-not-awaited", "simt/matrix.h",
          'self()->block->finish(meet_group("", 1, at))', "(void)0", "multiplies"),
    Fault("matrix-of-the-first-group", "simt/matrix.h", "return self()->lane / kGroup * kGroup",
          "return 0", "multiplies", 128),
    Fault("matrix-starts-as-zero", "simt/matrix.h", "memset(x, kUndefined, sizeof x)",
          "memset(x, 0, sizeof x)", "reads_unfilled"),
    Fault("matrix-pointer-of-16-bytes", "simt/matrix.h", "(p) % 32 != 0", "(p) % 16 != 0",
          "matrix_unaligned"),
    Fault("matrix-of-any-stride", "simt/matrix.h", "ldm * sizeof(T) % 16 != 0", "false",
          "matrix_odd_ldm"),
    Fault("matrix-lanes-may-disagree", "simt/matrix.h",
          "memcmp(c->values[first_of_group()], this, sizeof *this) != 0", "false",
          "matrix_of_two_strides"),
    Fault("matrix-of-fewer-lanes", "simt/matrix.h",
          "if (!self()->block->has_lane(self()->warp, first + kGroup - 1))", "if (false)",
          "matrix_of_a_few"),
    Fault("dynamic-shared-memory-kept", "simt/block.h",
          "memset(shared_.get(), kUndefined, launch_->shared_bytes)", "(void)0", "reads_unwritten"),
    Fault("static-shared-memory-kept", "simt/block.h", "static_shared_.undefine()", "(void)0",
          "reads_unwritten_static"),
    Fault("launchers-memory-lost", "simt/static_shared.h",
          "memcpy(memory_.first, kept_.data(), kept_.size())", "(void)0", "kept"),
    Fault("threads-not-reversed", "simt/order.h", "std::reverse(order.begin(), order.end())",
          "(void)0", "reverse"),
    Fault("seed-ignored", "simt/order.h", "std::mt19937_64(seed + ", "std::mt19937_64(1 + ",
          "random"),
    Fault("blocks-not-reversed", "simt/order.h", "return count - 1 - turn", "return turn",
          "reverse blocks"),
    Fault("a-block-twice", "simt/order.h", "while (std::gcd(step, count) != 1) ++step", "step = 2",
          "every block"),
    Fault("a-block-left-out", "simt/launch.h", "turn >= blocks_) break",
          "turn + 1 >= blocks_) break", "adds_up"),
    Fault("block-index-mixed-up", "simt/block.h", "unsigned(number / g.x % g.y)",
          "unsigned(number / g.y % g.x)", "notes_indices"),
    Fault("threads-overflow", "simt/launch.h", "b.x > kMaxThreads || b.y > kMaxThreads || ", "",
          "misfit"),
    Fault("watchdog-asleep", "simt/launch.h", "launch->expired.store(true,",
          "launch->expired.store(false,", "spins"),
    Fault("stream-not-kept", "simt/launch.h", "                       stream,\n",
          "                       stream ? nullptr : stream,\n", "last launch"),
    Fault("device-not-restored", "kh_vendor.h", "simt::os_thread.device = before_;", "",
          "device restored"),
)  # fmt: skip


# Each takes a compilation of all checks, so that other runs have every second one.
_PLANTED = FAULTS if os.environ.get("KERNELHUB_NIGHTLY") == "1" else FAULTS[::2]


def test_every_fault_has_its_place() -> None:
    times = {fault.name: (HOST / fault.file).read_text().count(fault.old) for fault in FAULTS}
    assert set(times.values()) == {1}, times


@pytest.mark.parametrize("fault", _PLANTED, ids=[fault.name for fault in _PLANTED])
def test_a_fault_of_the_emulator_is_noticed(fault: Fault, tmp_path: Path) -> None:
    host = tmp_path / "host"
    shutil.copytree(HOST, host)
    path = host / fault.file
    source = path.read_text()
    assert source.count(fault.old) == 1, source.count(fault.old)
    path.write_text(source.replace(fault.old, fault.new))
    code, said = output_of(compiled(host, tmp_path / "checks", fault.warp, "plain"), "all")
    assert code != 0
    assert f"WRONG {fault.noticed_by}:" in said or code < 0, said
