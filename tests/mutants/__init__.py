"""Planted faults of references and kernels: each must be caught by the op's own cases."""

from __future__ import annotations

import attrs


@attrs.frozen
class Mutant:
    """Replace `old` (which occurs exactly once in `module`'s source) by `new`.

    `module` is a Python module, or for a kernel a file below `csrc`, whose emulator has warps as
    `arch` says: some code is for one width alone. A fault in a header is compiled into all sources
    that read it, or into `only` one that uses it, which is quicker. `case` names one that catches
    it and comes first, where others would take long before.
    """

    name: str
    module: str
    old: str
    new: str
    arch: str = "warp32"
    only: str = ""
    case: str = ""
