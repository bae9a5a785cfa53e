"""The conformance kit: hold any backend to the contracts. See `docs/adding-a-backend.md`."""

from kernelhub.testing.harness import Outcome, compare, conform, run_case

__all__ = ["Outcome", "compare", "conform", "run_case"]
