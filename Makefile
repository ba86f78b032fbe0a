# `make` lists the targets. Everything runs in .venv, which is made on first use and again when requirements.txt changes.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help run test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

run: .venv/.installed ## the offline demo; ARGS="--seed 1" passes flags on (an earlier demo run is replaced)
	$(BIN)/python pipo.py --overwrite $(ARGS)

test: .venv/.installed ## the tests, on the CPU, without network
	$(BIN)/python -m pytest -q test_pipo.py $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv __pycache__ .pytest_cache

.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pipo needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	@touch $@
