# `make` lists the targets. Everything runs in .venv, which is made on first use and again when requirements.txt changes.
PYTHON ?= python3
BIN := .venv/bin
TRL := trl==1.16.0
.DEFAULT_GOAL := help
TORCH ?= torch
SLOW := demo_end or processes or results_come or plots_of or killed_at
.PHONY: help run test test-assets test-newest test-trl bench gpu mutants experiment real figures plot clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

run: .venv/.installed ## the offline demo; ARGS="--seed 1" passes flags on (an earlier demo run is replaced)
	$(BIN)/python pipo.py --overwrite $(ARGS)

test: .venv/.installed ## the tests, on the CPU (on CUDA too, where there is one), without network
ifdef ARGS
	$(BIN)/python -m pytest -q test_pipo.py $(ARGS)
else # in two processes, one a core
	$(BIN)/python -m pytest -q test_pipo.py -k "$(SLOW)" & \
	$(BIN)/python -m pytest -q test_pipo.py -k "not ($(SLOW))"; others=$$?; wait $$! && exit $$others
endif

test-assets: .venv/.installed ## the tests of assets/: the experiment by hand, the memory plan against a simulation
	$(BIN)/python -m pytest -q assets/test_experiment.py assets/test_memory_plan.py $(ARGS)

test-newest: ## the tests with the newest torch and transformers, in .venv-newest (TORCH=torch==... pins one)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q -U $(TORCH) transformers datasets sympy peft pytest matplotlib
	.venv-newest/bin/python -m pytest -q test_pipo.py $(ARGS)

test-trl: .venv/.trl ## assets/pipo_trl.py on TRL, in one process and in two, and assets/bench.py at a tiny size
	$(BIN)/python -m pytest -q assets/test_pipo_trl.py assets/test_bench.py $(ARGS)

bench: .venv/.trl ## speed and memory against generate and TRL, on one core -> runs/bench.json (about 15 minutes)
	$(BIN)/python assets/bench.py $(ARGS)

gpu: .venv/.installed ## a random Qwen3-4B on a GPU: plan against peak, speed, save and resume -> runs/bench-gpu.json
	$(BIN)/python assets/bench.py --gpu $(ARGS)

mutants: .venv/.installed ## whether the tests notice planted faults (minutes; one of them: make mutants ARGS="--only NAME")
	$(BIN)/python assets/mutants.py $(ARGS)

experiment: .venv/.installed ## PIPO, GRPO and controls over 8 seeds -> assets/ (hours; goes on where it stopped)
	$(BIN)/python assets/experiment.py run $(ARGS)
	$(BIN)/python assets/experiment.py table $(ARGS)

real: .venv/.installed ## SmolLM2-135M learns sums, on a CPU (hours; one run: make real ARGS="--arms pipo --seeds 0 --into runs/again")
	$(BIN)/python assets/real_model.py run $(ARGS)
	$(BIN)/python assets/real_model.py figure $(ARGS)

figures: .venv/.installed ## the README's figures and tables from the runs in assets/
	$(BIN)/python assets/experiment.py table $(ARGS)
	$(BIN)/python assets/experiment.py figures $(ARGS)
	$(BIN)/python assets/real_model.py figure

plot: .venv/.installed ## curves of your own runs: make plot RUNS="runs/a runs/b"
	$(BIN)/python assets/experiment.py plot $(RUNS)

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .venv-newest __pycache__ .pytest_cache

.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pipo needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

.venv/.trl: .venv/.installed
	$(BIN)/pip install -q $(TRL)
	@touch $@
