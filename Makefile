# Everything sets itself up: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lanes coverage lint wheel nightly clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(PYTEST)
	$(BIN)/python -m pytest -n 2 tests/emulation $(PYTEST)

# The compiled kernels on the emulator: warp widths, thread orders, sanitizers.
lanes: $(READY)
	PYTHON=$(BIN)/python bash tests/lanes.sh

# Which lines of the kernels the cases execute. Takes a quarter of an hour.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernel_coverage

nightly: $(READY)
	KERNELHUB_NIGHTLY=1 $(BIN)/python -m pytest -n 2 tests/test_hostile.py tests/test_kernel_mutants.py $(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	if command -v clang-format-14 >/dev/null; then \
	    git ls-files '*.mu' '*.muh' '*.h' '*.c' '*.cpp' | grep -v abi.h | xargs clang-format-14 --dry-run --Werror; \
	fi

wheel: $(READY)
	$(BIN)/python -m build --outdir dist

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
