# make run                        install into .venv if needed, then run the embedded model
# make run ARGS="model=gemma3_4b dry_run=true"
# make test                       install the test tools if needed, then run the tests, two files at a time (ARGS="-k conf")
# make lint                       ruff and mypy
# make bench                      the benches beside their peers, in an environment of their own; BENCH=roofline for one
# make clean                      remove .venv, caches and build output; never results
# Needs Python 3.11 to 3.13 and pip; PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BENCH ?= extraction_one_layer extraction_all_layers multiple_choice generation steered_generation llm_judge training_step
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
CHECK_PYTHON := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) \
  else "$(PYTHON) is Python %d.%d; truthsteer needs 3.11 to 3.13. Type: make PYTHON=python3.12 ..." % v)

.PHONY: help run test lint bench clean
help:
	@sed -n 's/^# //; 1,7p' Makefile

run: $(VENV)/.installed
	$(BIN)/python -m truthsteer $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The two peers ask for older versions of what they need, and run with ours (repeng after one name is given back to numpy).
bench:
	@test -e $(VENV)-bench/.installed || { \
	  $(PYTHON) -m venv $(VENV)-bench && \
	  $(VENV)-bench/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e . lm-eval==0.4.13 gguf && \
	  $(VENV)-bench/bin/python -m pip install --disable-pip-version-check --no-deps steering-vectors==0.12.2 repeng==0.4.0 && \
	  touch $(VENV)-bench/.installed; }
	for bench in $(BENCH); do $(VENV)-bench/bin/python bench/$$bench.py $(ARGS) || exit 1; done

clean:
	rm -rf .venv .venv-bench build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find truthsteer tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps hold the time of the last installation: it is repeated only when a file that decides it has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.installed

# Some distributions ship venv without the pip that belongs into it; then the system's pip puts one there.
$(BIN)/pip:
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }
