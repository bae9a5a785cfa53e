"""Mistake 1: the module needs something that is not there."""

raise ImportError("libvendor.so.3: cannot open shared object file")
