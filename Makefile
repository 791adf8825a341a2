# make demo: everything on embedded data, in minutes.  make run: the full TS1.  make test, make lint: the checks.
# make docs: the generated pages.
PYTHON ?= python3
PY := .venv/bin/python
RUN := $(PY) test_scenarios
DEMO := --dataset Digits --batch-size 64 --checkpoints-dir checkpoints/demo
DEMO_PREPARE := --weights none --epochs 3
DEMO_PRUNE := --epochs 1 --lr 0.0001 --repair-batches 2 --timing-seconds 2

.PHONY: help demo run test test-long test-floor test-newest test-gpu lint docs clean

help:
	@head -2 Makefile

.venv/installed: requirements.txt pyproject.toml
	@echo "Making an environment in .venv, with PyTorch in it: a few minutes"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $@

# The second round finds everything done, and prints the tables and the paths of the reports together.
demo: .venv/installed
	$(RUN)/TS1_01_prepare_model.py $(DEMO) $(DEMO_PREPARE) --fresh
	$(RUN)/TS1_02_coverage_pruning.py $(DEMO) $(DEMO_PRUNE) --fresh
	$(RUN)/TS1_03_wanda_pruning.py $(DEMO) $(DEMO_PRUNE) --fresh
	@echo; echo "The demo is done. Its tables again, from the records, and the comparison:"
	@$(RUN)/TS1_01_prepare_model.py $(DEMO) $(DEMO_PREPARE)
	@$(RUN)/TS1_02_coverage_pruning.py $(DEMO) $(DEMO_PRUNE)
	@$(RUN)/TS1_03_wanda_pruning.py $(DEMO) $(DEMO_PRUNE)
	@$(RUN)/TS1_04_compare_methods.py --dataset Digits --checkpoints-dir checkpoints/demo

run: .venv/installed
	$(RUN)/TS1_01_prepare_model.py
	$(RUN)/TS1_02_coverage_pruning.py
	$(RUN)/TS1_03_wanda_pruning.py
	$(RUN)/TS1_04_compare_methods.py

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadfile

# What takes minutes: kills at random moments, thousands of damaged files. The counts are printed.
test-long: .venv/installed-dev
	$(PY) -m pytest -m long -s

# `make test` at both ends of what requirements.txt allows, each in an environment of its own.
test-floor: PYTHON := python3.8
test-floor: VERSIONS := -c requirements-floor.txt
test-newest: PYTHON := python3.13
test-newest: VERSIONS := --upgrade --upgrade-strategy eager
test-floor test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet -r requirements.txt -e ".[dev]" $(VERSIONS)
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n 3 --dist loadfile

# What only a GPU can show, on the first one at hand: a page in results/gpu/.
test-gpu: .venv/installed
	$(PY) benchmarks/gpu_check.py

# Types are checked in the modules without PyTorch.
lint: .venv/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: .venv/installed-dev
	$(PY) benchmarks/make_docs.py

clean:
	rm -rf .venv .venv-floor .venv-newest
