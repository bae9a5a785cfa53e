"""The backends that ship with kernelhub; each is loaded through its entry point."""
