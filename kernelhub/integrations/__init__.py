"""kernelhub inside other libraries: one folder a library, imported by whoever wants it."""
