PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench frontier compare lint setup

# The stamp is newer than pyproject.toml once what it asks for is installed.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip check
	touch $@

setup: $(VENV)/.installed

# The main job: fetch model and text, run the default federation, print its table, audit it.
demo: setup
	$(BIN)/privtune assets fetch
	$(BIN)/privtune run demo --audit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three workers, one thread each, for two cores: tests of real federations mostly wait for Flower.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Split tuning against a message a step and against one process: simulations/results/transport.json
bench: setup
	$(BIN)/python -m simulations.transport

# Every mechanism at several strengths, accuracy beside what the auditor reads (hours; resumable, and
# a second process of the same command shares the work): simulations/results/frontier.json
frontier: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m simulations.frontier

# Split tuning beside federated baselines and bounds on the same text (hours; resumable):
# simulations/results/comparison.json and .csv, .md; docs/comparison-*.svg. --plan lists the runs.
compare: setup
	OMP_NUM_THREADS=1 $(BIN)/privtune compare comparison --audit quick --prune --jobs 2 \
		--out simulations/results/comparison.json --figures docs
