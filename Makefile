PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench lint setup

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

# Two workers, one thread each: two cores, and the deployment test mostly waits for Flower.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Split tuning against a message a step and against one process: simulations/results/transport.json
bench: setup
	$(BIN)/python -m simulations.transport
