"""`python -m kernelhub` is the command line."""

from kernelhub.cli import main

if __name__ == "__main__":
    main(prog_name="kernelhub")
