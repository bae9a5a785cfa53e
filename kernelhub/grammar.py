"""The one grammar in which backends are chosen: `KERNELHUB_BACKEND`, `configure` and `use`.

    rules  = rule (";" rule)*
    rule   = [op-glob "="] choice ("," choice)*
    choice = name | "-" name | "auto"

`reference` is a command: exactly that, for every op. `cuda,auto` prefers, `-musa` never uses, and
`fused_gemv=reference;*moe*=musa,reference` says it per op. Spaces around tokens are ignored.
Nothing here knows which ops or backends exist; `Rules.validate` is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NoReturn

import attrs

from kernelhub.errors import PolicyError, nearest

AUTO = "auto"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_CLASS = r"\[!?(?:[A-Za-z0-9_](?:-[A-Za-z0-9_])?)+\]"
_GLOB = re.compile(rf"(?:[A-Za-z0-9_*?]|{_CLASS})+")
_WILD = re.compile(rf"[*?]|{_CLASS}")
_RANGE = re.compile(r"(.)-(.)")  # a hyphen occurs in a glob only inside a class


@attrs.frozen
class Choice:
    """Backends in order of preference, and those never to be used.

    `names` keeps "auto" in its place: it stands for every backend not named, in default order. It
    is never empty: a choice that only excludes means "auto".
    """

    names: tuple[str, ...]
    excluded: frozenset[str] = frozenset()

    @property
    def forced(self) -> bool:
        """A single name is a command, not a preference."""
        return len(self.names) == 1 and self.names[0] != AUTO and not self.excluded


@attrs.frozen
class Rule:
    """A choice for the ops that match `glob`. Columns count from 0 and point into the text.

    `name_columns` has every backend that the rule names, chosen or excluded, in order.
    """

    glob: str
    choice: Choice
    column: int
    name_columns: tuple[tuple[str, int], ...] = ()

    @property
    def specificity(self) -> tuple[bool, int]:
        """An exact name beats any glob; among globs, more literal characters win."""
        literal, wildcards = _WILD.subn("", self.glob)
        return wildcards == 0, len(literal)

    def matches(self, op: str) -> bool:
        return fnmatchcase(op, self.glob)


@attrs.frozen
class Rules:
    """Parsed policy text."""

    text: str
    rules: tuple[Rule, ...]

    def match(self, op: str) -> Choice | None:
        """The choice of the most specific rule that matches `op`, or None where none does.

        Raises:
            PolicyError: two rules match equally well.
        """
        matching = [rule for rule in self.rules if rule.matches(op)]
        if not matching:
            return None
        best = max(rule.specificity for rule in matching)
        first, *rest = (rule for rule in matching if rule.specificity == best)
        if rest:
            _fail(
                f"'{first.glob}' and '{rest[0].glob}' match op '{op}' equally well; name the op",
                self.text,
                rest[0].column,
            )
        return first.choice

    def validate(self, ops: Iterable[str], backends: Iterable[str]) -> None:
        """Raise `PolicyError` for a name or glob that means nothing, or an op with two choices."""
        ops, backends = sorted(ops), set(backends)
        for rule in self.rules:
            if rule.glob != "*" and not any(rule.matches(op) for op in ops):
                _fail(
                    f"no op matches '{rule.glob}'; {nearest(rule.glob, ops)}",
                    self.text,
                    rule.column,
                )
            for name, column in rule.name_columns:
                if name not in backends:
                    known = nearest(name, backends | {AUTO})
                    _fail(f"no backend is named '{name}'; {known}", self.text, column)
        for op in ops:
            self.match(op)


def parse(text: str) -> Rules:
    """Parse policy text.

    Raises:
        PolicyError: the text breaks the grammar; the message points at the column.
    """
    rules: list[Rule] = []
    globs: set[str] = set()
    for segment, column in _split(text, 0, ";"):
        rule = _parse_rule(text, segment, column)
        if rule.glob in globs:
            what = "every op" if rule.glob == "*" else f"'{rule.glob}'"
            _fail(f"a second rule for {what}", text, rule.column)
        globs.add(rule.glob)
        rules.append(rule)
    return Rules(text, tuple(rules))


def parse_fallback(text: str) -> Literal["warn", "error", "quiet"]:
    """Parse what to do where a call on an accelerator lands on the reference.

    Raises:
        PolicyError: none of `warn`, `error`, `quiet`.
    """
    modes: tuple[Literal["warn", "error", "quiet"], ...] = ("warn", "error", "quiet")
    stripped, column = _strip(text, 0)
    for mode in modes:
        if mode == stripped:
            return mode
    _fail(f"no fallback is named '{stripped}'; {nearest(stripped, modes)}", text, column)


def _parse_rule(text: str, segment: str, column: int) -> Rule:
    token, start = _strip(segment, column)
    if not token:
        _fail("a rule is empty", text, start)
    glob, choices, choices_column = "*", segment, column
    parts = list(_split(segment, column, "="))
    if len(parts) > 2:
        _fail("a second '=' in one rule; rules are separated by ';'", text, parts[2][1] - 1)
    if len(parts) == 2:
        glob = _parse_glob(text, *parts[0])
        choices, choices_column = parts[1]

    names: list[str] = []
    excluded: set[str] = set()
    name_columns: dict[str, int] = {}
    for choice, choice_column in _split(choices, choices_column, ","):
        name, at, negative = _parse_choice(text, choice, choice_column)
        if name in (excluded if negative else names):
            _fail(f"'{name}' twice", text, at)
        if name in (names if negative else excluded):
            _fail(f"'{name}' is both chosen and excluded", text, at)
        if negative:
            excluded.add(name)
        else:
            names.append(name)
        if name != AUTO:
            name_columns[name] = at
    wish = Choice(tuple(names) or (AUTO,), frozenset(excluded))
    return Rule(glob, wish, start, tuple(name_columns.items()))


def _parse_glob(text: str, segment: str, column: int) -> str:
    glob, start = _strip(segment, column)
    if not glob:
        _fail("no op before '='", text, start)
    valid = _GLOB.match(glob)
    end = valid.end() if valid else 0
    if end < len(glob):
        _fail(f"{glob[end]!r} cannot stand here in the name of an op", text, start + end)
    for bounds in _RANGE.finditer(glob):
        if bounds[1] > bounds[2]:
            _fail(f"'{bounds[0]}' is an empty range", text, start + bounds.start())
    return glob


def _parse_choice(text: str, segment: str, column: int) -> tuple[str, int, bool]:
    """Name, the column where its choice starts, and whether it is excluded."""
    token, start = _strip(segment, column)
    if not token:
        _fail("a backend's name is missing", text, start)
    negative = token.startswith("-")
    name, at = _strip(token[1:], start + 1) if negative else (token, start)
    if not name:
        _fail("no name after '-'", text, at)
    valid = _NAME.match(name)
    end = valid.end() if valid else 0
    if end < len(name):
        _fail(f"{name[end]!r} cannot stand here in the name of a backend", text, at + end)
    if negative and name == AUTO:
        _fail("'auto' cannot be excluded", text, start)
    return name, start, negative


def _split(segment: str, column: int, separator: str) -> Iterable[tuple[str, int]]:
    """The parts between separators, each with the column where it starts."""
    for part in segment.split(separator):
        yield part, column
        column += len(part) + 1


def _strip(segment: str, column: int) -> tuple[str, int]:
    """The segment without surrounding space, and the column of what is left.

    Where nothing is left, the column is that of the segment.
    """
    token = segment.strip()
    return token, column + (len(segment) - len(segment.lstrip()) if token else 0)


def _fail(message: str, text: str, column: int) -> NoReturn:
    raise PolicyError(message, text=text, column=column)
