"""How long a call takes: graph replay on a GPU, wall time on a CPU, variants interleaved."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch

Call = Callable[[], Any]
Sampler = Callable[[], float]
"""Seconds a call, of one sample."""
Scope = Callable[[], contextlib.AbstractContextManager[Any]]
"""What must hold while a variant's calls are made (or captured)."""

_HOST_SAMPLE_S = 0.02
_LEAST_CALLS = 48  # in one graph: the time of its start is shared by all


@attrs.frozen
class Timing:
    """Seconds a call in each round."""

    samples: tuple[float, ...]

    @property
    def us(self) -> float:
        return statistics.median(self.samples) * 1e6

    @property
    def spread_us(self) -> float:
        """Half of what the middle half of the rounds spans."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 * 1e6


def ratio(a: Timing, b: Timing) -> float:
    """Median over the rounds of a's time over b's in the same round."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


def interleaved(
    samplers: Mapping[str, Sampler], rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings by variant, and why there is none of those that failed.

    In every round each variant has its turn, so that what else happens hits all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in samplers}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name, sample in samplers.items():
            if name not in failures:
                try:
                    times[name].append(sample())
                except Exception as error:  # of a kernel
                    failures[name] = f"{type(error).__name__}: {error}"
    timings = {name: Timing(tuple(times[name])) for name in samplers if name not in failures}
    return timings, failures


class HostClock:
    """Wall time of calls that are done when they return."""

    def method(self, graph_safe: bool) -> str:
        return "wall"

    def sampler(self, calls: Sequence[Call], scope: Scope, graph_safe: bool = True) -> Sampler:
        endless = itertools.cycle(calls)
        with scope():
            next(endless)()
            start = time.perf_counter()
            next(endless)()
        once = max(time.perf_counter() - start, 1e-8)
        count = max(1, int(_HOST_SAMPLE_S / once))

        def sample() -> float:
            with scope():
                start = time.perf_counter()
                for call in itertools.islice(endless, count):
                    call()
                return (time.perf_counter() - start) / count

        return sample

    def release(self) -> None:
        pass


class DeviceClock:
    """Replay of a graph that holds the calls; for what no graph can hold, the calls themselves.

    Finds everything by name in `torch.cuda`, `torch.musa`, ...: a device whose module has no graphs
    gets the second way, and so does every call where `graphs` is False.
    """

    def __init__(self, device: torch.device, graphs: bool = True) -> None:
        self._module: Any = getattr(torch, device.type)
        name = f"{device.type.upper()}Graph"
        self._graph: Any = getattr(self._module, name, None) if graphs else None
        self._module.set_device(device.index or 0)

    def method(self, graph_safe: bool) -> str:
        return "graph" if graph_safe and self._graph is not None else "eager"

    def sampler(self, calls: Sequence[Call], scope: Scope, graph_safe: bool = True) -> Sampler:
        passes = math.ceil(_LEAST_CALLS / len(calls))
        count = passes * len(calls)

        def all_calls() -> None:
            for _ in range(passes):
                for call in calls:
                    call()

        if self.method(graph_safe) == "graph":
            return self._timed(self._captured(calls, all_calls, scope).replay, count)

        def eager() -> None:
            with scope():
                all_calls()

        return self._timed(eager, count)

    def _captured(self, calls: Sequence[Call], all_calls: Call, scope: Scope) -> Any:
        module = self._module
        with scope():
            side = module.Stream()
            side.wait_stream(module.current_stream())
            with module.stream(side):  # builds, loads and warms up outside the capture
                for call in calls:
                    call()
            module.current_stream().wait_stream(side)
            module.synchronize()
            graph = self._graph()
            with module.graph(graph):
                all_calls()
        return graph

    def _timed(self, run: Call, count: int) -> Sampler:
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed_ms = max(float(start.elapsed_time(end)), 1e-6)  # clocks have steps
            return elapsed_ms / 1e3 / count

        for _ in range(2):
            sample()
        return sample

    def release(self) -> None:
        """Give back the memory of graphs and inputs that are gone."""
        with contextlib.suppress(RuntimeError):  # a kernel broke the device: its run says so
            self._module.synchronize()
            self._module.empty_cache()


Clock = HostClock | DeviceClock


def clock_of(device: torch.device, graphs: bool = True) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device, graphs)
