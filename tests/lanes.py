"""Cases of the compiled kernels on the emulator: orders of threads, and under the sanitizers.

python -m tests.lanes [all]

Every case at both warp widths, in the order of threads, is what `tests/emulation` runs. Here are
those that can tell more where threads come in another order or a sanitizer looks on; with `all`,
every case in every order too. Each lane is a process of its own, for the runtime of a sanitizer
must be there before Python is. Two run at a time. What they say comes whole, lane by lane.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs

AT_ONCE = 2
WIDTHS = (32, 128)

# What moves memory in another way, and not the cases that differ in numbers alone: of sampling,
# those take most of the time.
ACCESSES = (
    *("rotary_embedding/*", "fused_mul_add/*", "fused_gemv/*", "fused_moe_gemv/*", "*/long-rows-*"),
    *(
        f"top_k_top_p_sampling_from_probs/{layout}*"
        for layout in (
            *("every_second", "expanded", "misaligned", "padded_rows", "transposed"),
            *("indices", "requests", "token-is", "misleading"),
        )
    ),
)

# ThreadSanitizer takes about a millisecond a GPU thread. Every kernel, scheme and RMSNorm is there
# once with few rows: layouts, tails, groups, masked experts, the sum over slots, one block a row.
RACES = (
    *(
        f"rotary_embedding/{case}"
        for case in (
            *("partial-*", "*-neox-bfloat16", "*-gptj-float32", "batch*", "flat*", "packed*"),
            *("no-key*", "no-query-heads", "more-keys-than-queries", "offsets*", "token-gap"),
            *("cache-misaligned-in-packs", "positions-out-of-range"),
        )
    ),
    *(
        f"fused_mul_add/{case}"
        for case in (
            *("tail-*", "padded_rows-*", "transposed-*", "every_second-*", "misaligned-*"),
            *("broadcast", "scale-*", "ten-dimensions", "out-*"),
        )
    ),
    *("fused_gemv/*-k257*", "fused_gemv/*-k129*", "fused_gemv/*-m1", "fused_gemv/int4-g32-*"),
    *("fused_gemv/dense-norm", "fused_moe_gemv/*n9-k257", "fused_moe_gemv/int4-n9-k514"),
    *("fused_moe_gemv/ids-masked-*-shared", "fused_moe_gemv/ids-duplicates-reduce-swiglu"),
    "top_k_top_p_sampling_from_probs/misaligned-*",
    "top_k_top_p_sampling_from_probs/token-is-target-v129",
)
# What does without shared memory and warps runs at one width.
RACES_LEFT_OUT = {32: (), 128: ("!rotary_embedding/*", "!fused_mul_add/*")}
# Under AddressSanitizer these take long, and at one of the widths they do: filters and scales of
# each kind, the layers of models, and the whole slices of K that CUDA's own kernels are for.
LEFT_OUT = {
    32: (
        *("!top_k*/*-top_k_first*", "!fused_moe_gemv/fp8-channel-*"),
        *(f"!*/{model}*" for model in ("deepseek", "llama", "minimax", "mixtral", "qwen")),
    ),
    128: ("!top_k*/*-joint*", "!fused_moe_gemv/fp8-tensor-*", "!*/whole-slices-*"),
}

SHARED_ROWS = ("top_k_top_p_sampling_from_probs/misaligned-float32",)


@attrs.frozen
class Lane:
    """Options of the emulator, patterns of cases, and the sanitizer's runtime and options.

    `blocks`: how many share a row in sampling, if not as many as its length asks for.
    """

    options: str
    patterns: Iterable[str]
    runtime: tuple[str, ...] = ()
    environment: dict[str, str] = attrs.field(factory=dict)
    blocks: str = ""

    def command(self) -> list[str]:
        what = ("simt", "cpu", ",".join(self.patterns), self.blocks)
        return [sys.executable, "-m", "tests.vendor.run_cases", *what]

    def variables(self) -> dict[str, str]:
        preload = {"LD_PRELOAD": ":".join(map(_path_of, self.runtime))} if self.runtime else {}
        own = {"KERNELHUB_SIMT": self.options, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, **preload, **self.environment}


def _path_of(runtime: str) -> str:
    asked = ["g++", f"-print-file-name={runtime}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def orders(everything: bool) -> Iterator[Lane]:
    if not everything:  # each order at one of the widths
        yield Lane("warp=32,order=reverse,threads=1", ACCESSES)
        yield Lane("warp=128,order=random:1,threads=1", ACCESSES)
        return
    for warp in WIDTHS:
        for order in ("forward", "reverse", "random:1"):
            yield Lane(f"warp={warp},order={order},threads=1", "*")


def lanes(everything: bool) -> Iterator[Lane]:
    more = ("rotary_embedding/*", "fused_mul_add/*", "*/every-code-*", "*/long-rows-joint")
    # A race of two GPU threads is a data race; exit code 66 fails the lane.
    quiet = "report_signal_unsafe=0:ignore_noninstrumented_modules=1"
    watched = (("libtsan.so",), {"TSAN_OPTIONS": f"exitcode=66:{quiet}"})
    for warp in WIDTHS:
        races = (*RACES, *(more if everything else RACES_LEFT_OUT[warp]))
        yield Lane(f"warp={warp},sanitize=thread,threads=2", races, *watched)
    yield Lane("warp=128,sanitize=thread,threads=2", SHARED_ROWS, *watched, blocks="3")
    for warp in WIDTHS:
        # One OS thread: shared memory is then plain memory, whose edges AddressSanitizer sees.
        options = "detect_leaks=0:detect_stack_use_after_return=0"
        yield Lane(
            f"warp={warp},sanitize=address",
            "*" if everything else (*ACCESSES, *LEFT_OUT[warp]),
            # It must find what throws C++ exceptions when it starts, for torch throws.
            ("libasan.so", "libstdc++.so.6"),
            {"ASAN_OPTIONS": options},
        )
    yield from orders(everything)


class Runner:
    """Runs lanes, and ends those under way where the run is ended."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def run(self, lane: Lane) -> tuple[int, str]:
        """The exit status of a lane and what it said."""
        started = time.monotonic()
        variables = lane.variables()
        with self._guard:
            if self._stopped:
                return 1, "not run"
            process = subprocess.Popen(
                lane.command(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=variables,
            )
            self._running.add(process)
        said, _ = process.communicate()
        with self._guard:
            self._running.discard(process)
        return process.returncode, f"{said}{time.monotonic() - started:.0f} s\n"

    def stop(self) -> None:
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.terminate()


def run_all(given: list[Lane]) -> list[Lane]:
    """Run them; returns those that failed."""
    runner = Runner()
    failed = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for lane, (status, said) in zip(given, pool.map(runner.run, given), strict=True):
                print(f"== simt, {lane.options}\n{said}", end="", flush=True)
                if status != 0:
                    failed.append(lane)
                    print(f"== simt, {lane.options}: FAILED with {status}", flush=True)
        except BaseException:
            runner.stop()
            raise
    return failed


def main(which: str = "") -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = run_all(list(lanes(which == "all")))
    for lane in failed:
        print(f"failed: simt, {lane.options}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
