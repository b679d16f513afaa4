# Every target works alone on a fresh clone: it makes .venv and installs what it needs once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test lint typecheck docs docs-serve bench bench-scoring bench-training bench-diffusion reproduce tiny-models clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) -e '.[docs]'
	@touch $@

setup: $(VENV)/.dev

# Scores the standard library's held-out modules with the embedded model and writes report.html.
demo: $(VENV)/.core
	$(BIN)/loglik demo

# Two workers with one thread each use two cores better than one worker with two.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

# Peers side by side in one run; nothing else should run meanwhile.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

# Text to nats beside lm-evaluation-harness, minicons and a plain loop: about three quarters of an hour.
bench-scoring: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py scoring

# DPO steps beside TRL's trainer: time and peak memory at two vocabularies; about an hour.
bench-training: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py training

# Masked diffusion: variance of the estimators, shared masks, cached sampling, memory of the policy gradient; minutes.
bench-diffusion: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py diffusion

# The central claim of each paper as a small experiment.
reproduce: $(VENV)/.dev
	$(BIN)/python reproductions/run_all.py

# Trains the embedded models from scratch (about two hours on two cores; resumes) and installs them into the package.
tiny-models: $(VENV)/.core
	$(BIN)/python recipes/tiny/train.py --install src/loglik/models/embedded/tiny
	$(BIN)/python recipes/tiny/train_diffusion.py --install src/loglik/models/embedded/tiny-diffusion

clean:
	rm -rf $(VENV) site runs .pytest_cache .mypy_cache .ruff_cache
