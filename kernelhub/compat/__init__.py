"""The ops under the names of the code that they replace: one module a library."""
