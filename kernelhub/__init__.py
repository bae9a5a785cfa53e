"""kernelhub: one registry for the hot kernels of LLM inference.

import kernelhub

y = kernelhub.op("fused_gemv")(x, weight)      # the device of x decides who runs it
y = kernelhub.ops.fused_gemv(x, weight)        # the same function
with kernelhub.use("reference"):               # force a backend
    y = kernelhub.ops.fused_gemv(x, weight)
print(kernelhub.ops.fused_gemv.explain(x, weight))
"""

from kernelhub import ops
from kernelhub.errors import (
    ArgumentError,
    BackendUnavailable,
    FallbackWarning,
    KernelhubError,
    PolicyError,
    RegistrationError,
    UnknownName,
)
from kernelhub.function import get as op
from kernelhub.policy import configure, use
from kernelhub.selection import Candidate, Selection
from kernelhub.spec import TensorDesc

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendUnavailable",
    "Candidate",
    "FallbackWarning",
    "KernelhubError",
    "PolicyError",
    "RegistrationError",
    "Selection",
    "TensorDesc",
    "UnknownName",
    "configure",
    "op",
    "ops",
    "use",
]
