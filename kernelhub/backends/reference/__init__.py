"""The `reference` backend: every op as plain PyTorch, on every device.

Its implementations are the references of the registered contracts, so that an op and its reference
cannot come apart; the registry adds them.
"""

from kernelhub.backend import REFERENCE_PRIORITY, Backend

backend = Backend(
    name="reference",
    implementations=(),
    priority=REFERENCE_PRIORITY,
    description="plain PyTorch on any device: the definition of every op",
)
