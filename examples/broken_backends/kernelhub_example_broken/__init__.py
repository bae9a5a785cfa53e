"""Backends with one mistake each."""
