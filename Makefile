# Two commands do all the set-up: `make quickstart` and `make test`. Everything goes into .venv.

# A shell finds commands on the PATH that is set below; make 3.81, a Mac's, would not by itself.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing

# `python` in a submitted job is the one on the PATH of `ray start`.
export PATH := $(BIN):$(PATH)
# Ray's token auth: what `ray start` turns on, its clients have to be told.
export RAY_AUTH_MODE ?= token
export RAY_USAGE_STATS_ENABLED ?= 0
# Lines as they come, also where the output is piped.
export PYTHONUNBUFFERED := 1

.PHONY: help quickstart test test-long faults gpu check format clean
.DEFAULT_GOAL := help

help:  ## Show this
	@awk -F ':.*## +' '/^[a-z-]+:.*##/ { printf "%-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(DEVELOPING): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## Train and evaluate a small GPT on this machine, in minutes
	@$(BIN)/python -m manta.head up
	ray job submit -- python jobs/pretrain.py
	ray job submit -- python jobs/evaluate.py checkpoint=quickstart
	@echo
	@echo "Your model is trained and evaluated. Next:"
	@echo "  source $(VENV)/bin/activate; export RAY_AUTH_MODE=token"
	@echo "  python jobs/generate.py prompt='def main('     complete a prompt with it"
	@echo "  python jobs/pretrain.py name=mine data.source=FILE_OR_FOLDER     your own text"
	@echo "  python jobs/sweep.py                           find a better learning rate"
	@echo "  ray dashboard: http://127.0.0.1:8265           ray stop: end Ray"

test: $(DEVELOPING)  ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(DEVELOPING)  ## The longer matrices: 10,000 damaged shards, ten kills of a preparation
	$(BIN)/python -m pytest -m long

faults: $(DEVELOPING)  ## Every fault that a run survives, as a table (some 40 minutes)
	rm -f faults.md
	$(BIN)/python -m pytest -m "faults or not faults" --faults-table=$(CURDIR)/faults.md tests/faults
	cat faults.md

gpu: $(INSTALLED)  ## Prove this machine's GPU, part by part (ten minutes)
	$(BIN)/python jobs/bench.py what=gpu json=gpu.json

check: $(DEVELOPING)  ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEVELOPING)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment
	rm -rf $(VENV)
