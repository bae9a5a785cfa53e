"""Adds `pytest --kernelhub-backend NAME [--kernelhub-device DEVICE]`.

With it, pytest runs every case of every op that the backend implements; no test has to be written.
Loaded by pytest in every project, so it imports nothing until the option is used.
"""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("kernelhub", "hold a kernelhub backend to the contracts")
    group.addoption("--kernelhub-backend", metavar="NAME", help="backend to run the cases on")
    group.addoption(
        "--kernelhub-device",
        metavar="DEVICE",
        default=None,
        help="default: cpu, or the first device type that the backend serves",
    )


def pytest_configure(config: Any) -> None:
    if config.getoption("--kernelhub-backend"):
        config.option.pyargs = True
        config.args[:] = ["kernelhub.testing.conformance"]
