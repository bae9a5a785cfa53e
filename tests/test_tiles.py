"""Which tile serves a call: the tables, the variable, and that rows of x have no say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelhub import doctor, registry
from kernelhub.backends.native import abi, tiles
from kernelhub.bench import cases
from kernelhub.errors import PolicyError
from kernelhub.testing import run_case

GEMV = "fused_gemv"
CLASS = tiles.shape_class("int4", 4096, 4096)
ARCH = "of-no-table"
SIZES = [f"N={n},K={k}" for n in (64, 512, 513, 100_000) for k in (64, 4096)]


def chosen(op: str = GEMV, arch: str = ARCH) -> str:
    """The name of the tile of an int4 weight [4096, 4096]."""
    return tiles.OPS[op][tiles.choose(op, arch, "int4", 4096, 4096)]


def another(op: str = GEMV) -> str:
    """A tile that no table and no default gives to `CLASS`."""
    return next(
        name for name in tiles.OPS[op] if name != tiles.default(GEMV, ARCH, "int4", 4096, 4096)
    )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Tables as in a process that has read none."""
    forget()
    yield
    forget()


def forget() -> None:
    for cached in (tiles.choose, tiles.table_of, tiles._from_environment):
        cached.cache_clear()


def calls(op: str, rows: list[int]) -> Iterator[Any]:
    """Described arguments of every scheme and of small, odd and large weights."""
    shapes = SIZES if op == GEMV else ["E=4,k=2,H=4096,I=768", "E=4,k=2,H=64,I=32,stage=down"]
    for case in cases.collect([op], [], shapes, rows, list(cases.KINDS[op].schemes)):
        for (call,) in case.sets(torch.device("meta"), 0):
            yield call


class Recorder(dict[torch.device, Any]):
    """Launchers that launch nothing and keep what they were given."""

    def __init__(self, op: str) -> None:
        self.tile = [field.name for field in abi.OPS[op]].index("tile")
        self.given: list[int] = []

    def __missing__(self, device: torch.device) -> Any:
        return lambda *values: self.given.append(values[self.tile])

    def arch(self, device: torch.device) -> str:
        return ARCH


@pytest.mark.parametrize("op", tiles.OPS)
def test_the_class_of_a_call_is_the_one_that_its_kernel_looks_up(op: str) -> None:
    """Every tile reaches the launcher through the class that the benchmark names."""
    recorder = Recorder(op)
    prepare = importlib.import_module(f"kernelhub.backends.native.{op}").make(recorder).prepare
    seen = set()
    for call in calls(op, [1]):
        bound = registry.spec(op).bind(**call)
        name = tiles.classes_of(op, bound)
        seen.add(name.split()[0])
        recorder.given.clear()
        fitting = tiles.tiles_for(name, ARCH)
        for tile in fitting:
            with tiles.override({op: {name: tile}}):
                prepare(bound)(*(getattr(bound, p.name) for p in registry.spec(op).params))
        assert recorder.given == [tiles.OPS[op].index(tile) for tile in fitting]
    assert seen == set(tiles._SCHEMES.values())


@pytest.mark.parametrize("op", tiles.OPS)
def test_rows_of_x_do_not_matter(op: str) -> None:
    names = [
        [tiles.classes_of(op, registry.spec(op).bind(**call)) for call in calls(op, [rows])]
        for rows in (1, 2, 16, 100)
    ]
    assert len(names[0]) > 5
    assert names == [names[0]] * 4


@pytest.mark.parametrize(
    ("rows", "k", "name"),
    [
        (1, 512, "fp8 n512 k512"),
        (0, 513, "fp8 n512 k1024"),
        (4096, 4097, "fp8 n4096 k8192"),
        (152_064, 2**30, "fp8 n65536 k65536"),
    ],
)
def test_sizes_are_rounded_up_within_limits(rows: int, k: int, name: str) -> None:
    assert tiles.shape_class("fp8", rows, k) == name


def test_an_override_lasts_as_long_as_its_block() -> None:
    before, after, of_the_other = chosen(), another(), chosen("fused_moe_gemv")
    with tiles.override({GEMV: {CLASS: after}}):
        assert chosen() == after
        assert chosen("fused_moe_gemv") == of_the_other
        with tiles.override({GEMV: {CLASS: before}}):
            assert chosen() == before
        assert chosen() == after
    assert chosen() == before
    with pytest.raises(ZeroDivisionError), tiles.override({GEMV: {CLASS: after}}):
        raise ZeroDivisionError
    assert chosen() == before


def test_a_refused_override_changes_nothing() -> None:
    before = chosen()
    with pytest.raises(PolicyError, match="override: "), tiles.override({GEMV: {CLASS: "no"}}):
        pass
    assert chosen() == before
    assert not tiles._overrides


def test_the_variable_goes_before_the_shipped_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, path = tmp_path / "shipped.json", tmp_path / "mine.json"
    first, second = tiles.OPS[GEMV][:2]
    shipped.write_text(json.dumps({"known": {GEMV: {CLASS: first}}}))
    path.write_text(json.dumps({GEMV: {CLASS: second}, "measured": {"us": 1.5, GEMV: 3}}))
    monkeypatch.setattr(tiles, "_SHIPPED", shipped)
    assert chosen(arch="known") == first
    assert chosen() == tiles.default(GEMV, ARCH, "int4", 4096, 4096)
    forget()
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    assert chosen(arch="known") == second
    assert chosen() == second
    with tiles.override({GEMV: {CLASS: first}}):
        assert chosen() == first


WRONG = {
    "not-json": ("{", "cannot be read: "),
    "not-text": (b"\xff\xfe\x00", "cannot be read: "),
    "too-deep": ("[" * 100_000, "cannot be read: "),
    "a-list": ("[]", "expected an object, got list"),
    "classes-a-list": ({GEMV: []}, f"{GEMV}: expected an object, got list"),
    "op": ({"fused_gem": {}}, "op 'fused_gem' has no tiles; did you mean 'fused_gemv'?"),
    "class": ({GEMV: {"int4 n4096": "x"}}, f"{GEMV}: 'int4 n4096' is no shape class: expected "),
    "scheme": ({GEMV: {"int3 n512 k512": "x"}}, "'int3 n512 k512' is no shape class"),
    "size": ({GEMV: {"int4 n500 k512": "x"}}, "'int4 n500 k512' is no shape class"),
    "long": ({GEMV: {f"int4 n{'1' * 5000} k512": "x"}}, "is no shape class"),
    "tile": ({GEMV: {CLASS: "r16w99"}}, f"{GEMV}, {CLASS}: there is no tile 'r16w99'; "),
    "not-a-tile": ({GEMV: {CLASS: [1]}}, f"{GEMV}, {CLASS}: there is no tile '[1]'; "),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_file_is_named(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, said = WRONG[wrong]
    path = tmp_path / "tiles.json"
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    with pytest.raises(PolicyError) as caught:
        chosen()
    assert f"{tiles.VARIABLE}: {path}" in str(caught.value)
    assert said in str(caught.value)
    (variable,) = (v for v in doctor.examine().environment if v.name == tiles.VARIABLE)
    assert said in variable.fault


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "gone.json"))
    with pytest.raises(PolicyError, match=r"gone\.json cannot be read: .*No such file"):
        chosen()


def test_doctor_knows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({GEMV: {CLASS: another()}}))
    monkeypatch.setenv(tiles.VARIABLE, f" {path} ")
    (variable,) = (v for v in doctor.examine().environment if v.name == tiles.VARIABLE)
    assert (variable.fault, variable.note) == ("", "")
    assert chosen() == another()


def test_the_shipped_table_is_well_formed() -> None:
    for arch in json.loads(tiles._SHIPPED.read_text()):
        assert tiles.table_of(arch), arch


_SCHEMES_OF_CASES = ("dense", "fp8", "int4")
_CASES = (
    *("dense-m17", "dense-float16", "w8a16-m16", "w8a8-block-g32-x-group"),
    *("w4a16-m2", "w4a16-swiglu", "int4-g128-zeros-uint8"),
)


@pytest.mark.parametrize("tile", [name for name in tiles.GEMV_TILES if name[0] in "mr"])
def test_every_portable_tile_computes_the_op(tile: str) -> None:
    classes = {tiles.shape_class(scheme, 512, 512): tile for scheme in _SCHEMES_OF_CASES}
    cases_of = {case.name: case for case in registry.spec(GEMV).cases()}
    for name in _CASES:
        with tiles.override({GEMV: classes}):
            outcome = run_case(GEMV, cases_of[name], "simt")
        assert outcome.status == "passed", (name, outcome.message)


@pytest.mark.parametrize("tile", [name for name in tiles.GEMV_TILES if name.startswith("m")])
def test_tiles_of_the_matrix_unit_where_there_is_none(tile: str) -> None:
    name = tiles.shape_class("int4", 512, 512)
    with tiles.override({GEMV: {name: tile}}):
        assert tiles.choose(GEMV, "mp_31", "int4", 512, 512) == tiles.GEMV_TILES.index(tile)
        with pytest.raises(PolicyError, match=f"tile '{tile}' is not for mp_22"):
            tiles.choose(GEMV, "mp_22", "int4", 512, 512)


@pytest.mark.parametrize("tile", [name for name in tiles.GEMV_TILES if name[0] in "sd"])
def test_tiles_of_cuda_alone(tile: str) -> None:
    """They come with the portable tile for what they do not serve; elsewhere they are refused."""
    name = tiles.shape_class("int4", 512, 512)
    with tiles.override({GEMV: {name: tile}}):
        for arch in ("sm_90a", "sm_100"):
            chosen = tiles.choose(GEMV, arch, "int4", 512, 512)
            assert tiles.GEMV_TILES[chosen & 0xFF] == tile
            assert tiles.GEMV_TILES[chosen >> 8] == "m64w2"
        for arch in ("sm_80", "sm_120", "mp_31", "warp32"):
            with pytest.raises(PolicyError, match=f"tile '{tile}' is not for {arch}; "):
                tiles.choose(GEMV, arch, "int4", 512, 512)


def test_tiles_that_a_scheme_has_not() -> None:
    for scheme, tile in (("fp32", "m16w4"), ("dense", "s4x2c1"), ("fp8", "d4x2c1")):
        name = tiles.shape_class(scheme, 512, 512)
        wrong = pytest.raises(PolicyError, match=f"tile '{tile}' is not for it")
        with wrong, tiles.override({GEMV: {name: tile}}):
            pass


@pytest.mark.parametrize("scheme", ["dense", "fp8", "int4", "fp32"])
@pytest.mark.parametrize("op", tiles.OPS)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80", "mp_31", "mp_22"])
def test_defaults_are_for_their_architecture(op: str, scheme: str, arch: str) -> None:
    for rows, k in ((512, 512), (4096, 4096), (4096, 7168), (32768, 8192), (65536, 65536)):
        name = tiles.shape_class(scheme, rows, k)
        assert tiles.default(op, arch, scheme, rows, k) in tiles.tiles_for(name, arch)
