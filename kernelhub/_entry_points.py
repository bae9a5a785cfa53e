"""Reads entry points. The only file that knows the `entrypoints` package."""

from __future__ import annotations

import configparser
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import attrs
import entrypoints  # type: ignore[import-untyped]


@attrs.frozen
class Entry:
    """One entry point: a name, where it points, who declares it, and how to load it."""

    name: str
    target: str
    distribution: str
    load: Callable[[], Any]


def read(group: str) -> tuple[list[Entry], list[str]]:
    """All entry points of a group on `sys.path`, and a line for each piece of broken metadata."""
    entries: list[Entry] = []
    problems: list[str] = []
    for folder in dict.fromkeys(p for p in sys.path if isinstance(p, str)):  # as import does
        # As with imports, a distribution found earlier on the path hides a later one of its name.
        hidden = {_distribution(entry) for entry in entries}
        found_here: list[Entry] = []
        _read_folder(group, folder, found_here, problems)
        entries.extend(entry for entry in found_here if _distribution(entry) not in hidden)
    return entries, problems


def _distribution(entry: Entry) -> str:
    return entry.distribution.split(" ")[0].lower().replace("-", "_")


def _read_folder(group: str, folder: str, entries: list[Entry], problems: list[str]) -> None:
    try:
        found = entrypoints.get_group_all(group, path=[folder])
    except (configparser.Error, ValueError, OSError, KeyError) as error:
        # One unreadable entry_points.txt must not hide its neighbours in the folder.
        problems.append(f"unreadable entry points in {folder}: {' '.join(str(error).split())}")
        _read_one_by_one(group, folder, entries, problems)
        return
    for point in found:
        target = ":".join(filter(None, (point.module_name, point.object_name)))
        version = point.distro.version if point.distro else None
        owner = f"{point.distro.name} {version or ''}".strip() if point.distro else "unknown"
        entries.append(Entry(point.name, target, owner, point.load))


def _read_one_by_one(group: str, folder: str, entries: list[Entry], problems: list[str]) -> None:
    for distribution in importlib.metadata.distributions(path=[folder]):
        owner = str(distribution.metadata["Name"] or "unknown")
        try:
            points = [p for p in distribution.entry_points if p.group == group]
        except Exception:
            continue  # reported above
        version = distribution.version
        entries.extend(Entry(p.name, p.value, f"{owner} {version}", p.load) for p in points)
