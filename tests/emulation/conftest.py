"""Gives the process `musa` devices. They stay, so this folder is a pytest run of its own."""

import os
import tempfile
from pathlib import Path

from tests.emulation import libraries, musa

musa.install()

_shipped = tempfile.TemporaryDirectory(prefix="kernelhub-musa-")
libraries.ship(Path(_shipped.name))
os.environ["KERNELHUB_LIBRARY_PATH"] = _shipped.name
