# make demo: everything on embedded data, in minutes.  make run: the full TS1.  make test, make lint: the checks.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := --dataset Digits --seed 0
RUN := $(PY) test_scenarios

.PHONY: demo run test lint clean

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $@

run: .venv/installed
	$(RUN)/TS1_01_prepare_model.py
	$(RUN)/TS1_02_coverage_pruning.py
	$(RUN)/TS1_03_wanda_pruning.py

test: .venv/installed-dev
	$(PY) -m pytest

lint: .venv/installed-dev
	$(PY) -m ruff check .

clean:
	rm -rf .venv
