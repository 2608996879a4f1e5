# Everything runs in .venv; each target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
LOCK := requirements/lock.txt
DEEPSPEED := requirements/deepspeed.txt

# Where compiled Python is not kept, each of the many processes that tests start compiles tandem anew.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile \
	--no-loadscope-reorder

# Not a make of its own: make starts that even where it was asked only to show what it would do.
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/hadolint Dockerfile

.PHONY: demo test slowest corruption lint format setup bench clean

demo: setup
	$(BIN)/tandem run demo

# Lint and types are checked beside the tests; what they say comes last, so that it can be read.
test: setup
	@said=$$(mktemp); ($(LINT)) >$$said 2>&1 & lint=$$!; \
	$(TESTS); tests=$$?; \
	wait $$lint; checked=$$?; cat $$said; rm -f $$said; \
	test $$tests -eq 0 -a $$checked -eq 0

# What of the tests takes long: make slowest
slowest: setup
	$(TESTS) --durations=30

corruption: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.corruption

lint: setup
	$(LINT)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m benchmarks

setup: $(STAMP)

$(STAMP): $(LOCK) $(DEEPSPEED) pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("tandem needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement $(LOCK)
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --requirement $(DEEPSPEED)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

clean:
	rm -rf .venv build dist runs .hypothesis .pytest_cache .mypy_cache .ruff_cache
