"""What `kernelhub bench` measures and how: see `docs/performance.md`."""
