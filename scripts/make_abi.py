"""Writes `csrc/include/kernelhub/abi.h` from the table in `kernelhub/backends/native/abi.py`.

Run `python scripts/make_abi.py` after a change of the table. A test compares.
"""

from __future__ import annotations

from pathlib import Path

from kernelhub.backends.native import abi

HEADER = Path(__file__).parent.parent / "csrc" / "include" / "kernelhub" / "abi.h"

if __name__ == "__main__":
    HEADER.write_text(abi.header())
