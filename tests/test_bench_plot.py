"""`kernelhub bench --plot`: the picture shows the figures, from a run or from its JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from kernelhub.bench import clock, inputs, plot, runs
from tests.commands import run

SHORT = ("bench", "--op", "fused_mul_add", "--shape", "H=64", "--rows", "1,2", "--rounds", "1",
         "--backend", "reference")  # fmt: skip
PNG = b"\x89PNG\r\n"


def row(op: str, scheme: str, backend: str, size: int, us: float, **more: Any) -> dict[str, Any]:
    facts = {"op": op, "scheme": scheme, "backend": backend, "status": "timed", "fault": ""}
    return {
        **facts,
        "bytes": size,
        "us": us,
        "gbs": size / us / 1e3,
        "floor_us": us / 2,
        "note": "",
        **more,
    }


REPORT: dict[str, Any] = {
    "device": {"type": "cuda", "name": "Acme 9000"},
    "roof": {"read_gbs": 4000.0, "copy_gbs": 4100.0},
    "results": [
        row("fused_gemv", "bf16", "cuda", 10**6, 10.0),
        row("fused_gemv", "int4", "cuda", 10**7, 20.0),
        row("fused_gemv", "int4", "peer:vllm", 10**7, 40.0, note="other layout"),
        {**row("fused_gemv", "int4", "musa", 10**7, 1.0), "status": "declined"},
    ],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    seen: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: seen.append(figure))
    plot.draw(REPORT, tmp_path / "x.png")
    return seen[0]


def test_each_timed_row_is_a_marker_at_its_figures(drawn: Any) -> None:
    (axes,) = drawn.axes
    assert axes.get_xscale() == "log" and axes.get_title() == "Acme 9000"
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    where = [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points]
    assert where == [(1e6, 100.0), (1e7, 500.0), (1e7, 250.0)]
    bf16, int4, peer = points
    assert bf16.get_marker() != int4.get_marker() == peer.get_marker()
    assert bf16.get_color() == int4.get_color() != peer.get_color()
    assert peer.get_markerfacecolor() == "none" and int4.get_markerfacecolor() != "none"


def test_the_roof_and_the_floor_are_lines(drawn: Any) -> None:
    (axes,) = drawn.axes
    roof, floor = (next(x for x in axes.lines if x.get_label() == n) for n in ("roof", "floor"))
    assert list(roof.get_ydata()) == [4100.0, 4100.0]
    assert list(floor.get_xdata()) == [10**6, 10**7]
    assert list(floor.get_ydata()) == [200.0, 500.0]


def test_the_legend_names_all(drawn: Any) -> None:
    (legend,) = drawn.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["fused_gemv bf16", "fused_gemv int4", "cuda", "peer:vllm", "roof", "floor"]
    cuda = legend.legend_handles[2]
    assert same_color(cuda.get_color(), drawn.axes[0].lines[0].get_color())


def test_a_run_draws_and_its_json_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(inputs.ROTATED_BYTES, "cpu", 4096)
    monkeypatch.setattr(clock, "_HOST_SAMPLE_S", 0.002)
    first, second, kept = (tmp_path / name for name in ("a.png", "b.png", "kept.json"))
    run(*SHORT, "--json", str(kept), "--plot", str(first))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("timed again")

    monkeypatch.setattr(runs, "measure", never)
    assert run("bench", "--from", str(kept), "--plot", str(second)).stdout == ""
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(PNG)


def test_without_matplotlib_it_says_so_before_it_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(*SHORT, "--plot", str(tmp_path / "x.png"), code=1)
    assert "--plot needs matplotlib: pip install 'kernelhub[plot]'" in result.stderr
    assert result.stdout == ""


def test_nothing_timed_draws_nothing(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    result = run(*SHORT[:-1], "cuda", "--plot", str(picture), code=1)
    assert isinstance(result.exception, SystemExit)  # a no, not a crash
    assert "nothing was timed" in result.stdout and not picture.exists()


@pytest.mark.parametrize(
    ("arguments", "content", "said"),
    [
        (["--from", "kept.json"], REPORT, "it needs --plot, and no cases"),
        (["--from", "kept.json", "--plot", "x.png", "--suite", "decode"], REPORT, "no cases to"),
        (["--from", "kept.json", "--plot", "x.pdf"], REPORT, "a name that ends in .png"),
        (["--from", "kept.json", "--plot", "no/x.png"], REPORT, "cannot be written"),
        (["--from", "kept.json", "--plot", "x.png"], {}, "kept.json holds no results of bench"),
        (["--from", "kept.json", "--plot", "x.png"], [], "kept.json holds no results of bench"),
        (
            ["--from", "kept.json", "--plot", "x.png"],
            {**REPORT, "results": []},
            "holds no results of bench --json: nothing was timed",
        ),
    ],
)
def test_what_cannot_be_drawn(
    arguments: list[str], content: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text(json.dumps(content))
    assert said in run("bench", *arguments, code=2).stderr
    assert not (tmp_path / "x.png").exists()
