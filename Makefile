# `make quickstart` and `make test` also do all the set-up. Everything is installed into .venv.

# bash finds commands on the PATH that is set below; make 3.81, which Macs have, would not do so.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing

# A submitted job runs the `python` that was on the PATH of `ray start`.
export PATH := $(BIN):$(PATH)
# Ray's token auth: `ray start` turns it on, and clients have to be told so.
export RAY_AUTH_MODE ?= token
# The job server of the head node that listens on this machine only.
export RAY_API_SERVER_ADDRESS ?= http://127.0.0.1:8265
export RAY_USAGE_STATS_ENABLED ?= 0
# Print lines without delay, even if the output is piped.
export PYTHONUNBUFFERED := 1

.PHONY: help quickstart chat monitor test test-long faults gpu check format clean
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
	@$(BIN)/python -m manta.cluster up
	ray job submit -- python jobs/pretrain.py
	ray job submit -- python jobs/evaluate.py checkpoint=quickstart
	@echo
	@echo "Your model is trained and evaluated. Next:"
	@echo "  source $(VENV)/bin/activate; export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"
	@echo "  python jobs/generate.py prompt='def main('     complete a prompt with it"
	@echo "  python jobs/pretrain.py name=mine data.source=FILE_OR_FOLDER     your own text"
	@echo "  python jobs/sweep.py                           find a better learning rate"
	@echo "  ray dashboard: http://127.0.0.1:8265           ray stop: end Ray"

chat: $(INSTALLED)  ## Fine-tune the quickstart's model on conversations, and count its answers
	@$(BIN)/python -m manta.cluster up
	python jobs/questions.py
	ray job submit -- python jobs/pretrain.py
	ray job submit -- python jobs/finetune.py base=quickstart data.source=$${MANTA_HOME:-$$HOME/manta}/questions.jsonl
	python jobs/answers.py checkpoint=chat
	@echo
	@echo "Talk with it: python jobs/chat.py checkpoint=chat"
	@echo "On a page:    pip install -e '.[serve]'; python jobs/serve.py checkpoint=chat"

monitor: $(INSTALLED)  ## Watch this machine's runs with Prometheus: figures, alerts, a board
	@$(BIN)/python -m manta.monitor

test: $(DEVELOPING)  ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(DEVELOPING)  ## Run the long tests: 10,000 damaged shards, ten kills of a preparation
	MANTA_TEST_NEW=1 $(BIN)/python -m pytest -m long

faults: $(DEVELOPING)  ## Test every fault that a run survives; writes a table (40 minutes)
	rm -f faults.md
	$(BIN)/python -m pytest -m "faults or not faults" --faults-table=$(CURDIR)/faults.md tests/faults
	cat faults.md

gpu: $(INSTALLED)  ## Check this machine's GPU, part by part (ten minutes)
	$(BIN)/python jobs/bench.py what=gpu json=gpu.json

check: $(DEVELOPING)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEVELOPING)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment
	rm -rf $(VENV)
