# Everything sets itself up: a virtual environment in .venv with the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TWO := -n 2 --dist worksteal

.PHONY: demo test lanes coverage lint wheel nightly clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest $(TWO) $(PYTEST)
	$(BIN)/python -m pytest $(TWO) tests/emulation $(PYTEST)

# The compiled kernels on the emulator: thread orders, sanitizers.
lanes: $(READY)
	$(BIN)/python -m tests.lanes

# Which lines of the kernels the cases execute. Takes a quarter of an hour.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernel_coverage

nightly: $(READY)
	KERNELHUB_NIGHTLY=1 $(BIN)/python -m pytest $(TWO) \
	    tests/test_hostile.py tests/test_kernel_mutants.py tests/test_emulator.py \
	    tests/test_vendor.py $(PYTEST)
	$(BIN)/python -m tests.lanes all

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	if command -v clang-format-14 >/dev/null; then \
	    git ls-files '*.mu' '*.muh' '*.cu' '*.h' '*.c' '*.cpp' | grep -v abi.h | xargs clang-format-14 --dry-run --Werror; \
	fi

wheel: $(READY)
	$(BIN)/python -m build --outdir dist

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
