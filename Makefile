# Every target sets up what it needs on a fresh machine: a virtual environment, the pinned install, then the thing
# itself. A second call finds the stamp and starts at once. `make test PYTHON=python3.12` picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
SOURCES := setup.py mtpkern kernels train bench tests

.DEFAULT_GOAL := help
.PHONY: help install demo real test test-slow check lint types fmt figures checkpoint ablate aot gpu test-oldest test-newest clean

help: ## List the targets.
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP) ## Virtual environment and pinned install, nothing else.

define make_venv
	@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"the pinned set needs Python >= 3.11, $(1) is %d.%d; run: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(1) -m venv $(2)
endef

$(STAMP): constraints.txt pyproject.toml setup.py
	$(call make_venv,$(PYTHON),$(VENV))
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: $(STAMP) ## Solve word problems with the shipped checkpoint, several tokens at a time.
	$(BIN)/mtpkern demo

test: $(STAMP) ## Run the tests but for those marked slow, at most four processes of one thread each.
	$(PYTEST) -m "not slow" -n auto --maxprocesses=4 $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run those marked slow; .ci/run runs both.
	$(PYTEST) -m slow -n auto --maxprocesses=4 $(PYTEST_ARGS)

check: lint types ## Lint, format check and types; edits nothing.

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# mypy follows folders, not setup.py's package_dir: links show it the package as it is imported once installed. Its
# messages name the files through the links (kernels/ is mtpkern/kernels/ there).
types: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/mtpkern
	@ln -s $(CURDIR)/mtpkern/* $(CURDIR)/kernels $(CURDIR)/train $(CURDIR)/bench build/types/mtpkern/
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p mtpkern

fmt: $(STAMP) ## Sort imports, mend what ruff can mend, format.
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# REAL_ARGS="--number 20 --batch-size 1 8" for fewer prompts, or eight at a time as well.
REAL_ARGS ?=
real: $(STAMP) ## SmolLM2-135M-Instruct with its gated adapter: its own answers several tokens a pass, beside its own generate.
	$(BIN)/python -m mtpkern.bench.real --by-load $(REAL_ARGS)

# FIGURES_ARGS="--limit 1000" for more problems; runs/figures keeps what is decoded, and a second call goes on.
FIGURES_ARGS ?= --limit 400
figures: $(STAMP) ## The figures of docs/figures again: the shipped checkpoint in every way, two courses of training, and what stands in bench/results.
	$(BIN)/mtpkern eval mtpkern/assets --data mtpkern/assets/problems.jsonl --answer hashes --max-new-tokens 128 \
	  --strategies static:2 static:3 static:4 static:6 confadapt:8:0.5 confadapt:8:0.7 confadapt:8:0.9 confadapt:8:0.99 \
	  verified:12:0.3 verified:12:0.6 verified:12:0.8 --batch-size 32 --output runs/figures $(FIGURES_ARGS)
	$(BIN)/mtpkern plot runs/figures --output docs/figures
	cp runs/figures/results.md runs/figures/results.json docs/figures/
	$(BIN)/mtpkern generate mtpkern/assets --strategy verified:12:0.6 --html docs/figures/blocks.html --prompt \
	  "Question: Ronpu has 41 stamps. Then Ronpu buys 4 baskets with 5 stamps each. Count the stamps of Ronpu now."
	$(BIN)/python -m mtpkern.train.arithmetic --write runs/course/problems --problems 8000 --held-out 200
	$(BIN)/mtpkern train docs/figures/course.yaml
	$(BIN)/mtpkern plot runs/course/run --output docs/figures/course
	$(BIN)/python -m mtpkern.train.arithmetic --write runs/full/problems --problems 4000 --held-out 200
	$(BIN)/mtpkern train docs/figures/full.yaml
	$(BIN)/mtpkern plot runs/full/run --output docs/figures/full
	for results in real.json real_eval.json h200/throughput.json h200/train-2.txt; do \
	  $(BIN)/mtpkern plot bench/results/$$results --output docs/figures/real || exit; done
	$(BIN)/mtpkern plot bench/results/cpu/throughput.json --output docs/figures/cpu

checkpoint: $(STAMP) ## Train the shipped checkpoint again from nothing, into runs/checkpoint/shipped.
	$(BIN)/python -m mtpkern.train.checkpoint

# The start is the first phase of `make checkpoint`; ABLATE_ARGS="--steps 2000 --seeds 0 1 2" makes the runs longer.
ABLATE_START ?= runs/checkpoint/teacher
ABLATE_ARGS ?=

ablate: $(STAMP) ## Compare the training recipe's switches at matched steps; goes on where it was stopped.
	$(BIN)/python -m mtpkern.train.ablate --start $(ABLATE_START) $(ABLATE_ARGS)

# AOT_ARGS=--changed takes from the table in bench/results what is as it was and fails where that lacks a kernel;
# AOT_ARGS="--changed --write" brings the table up to date; AOT_ARGS="--cases readout --verbose" prints a line a kernel.
AOT_ARGS ?=

aot: $(STAMP) ## Compile every kernel for five GPUs that need not be here: registers, spill, shared memory; fails over budget.
	OMP_NUM_THREADS=1 $(BIN)/python -m mtpkern.bench.aot $(AOT_ARGS)

# The machine's own python where its torch sees a GPU, as is: it may have no network. Else the virtual environment.
# `make gpu GPU_ARGS="--results FOLDER"` writes there as well.
GPU_ARGS ?=
gpu: ## On a GPU, within nine minutes: its tests, then every benchmark; tables and goals go to bench/results/gpu.md.
	@for python in $(PYTHON) $(BIN)/python; do \
	  if $$python -c 'import torch, transformers, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    exec $$python bench/gpu.py $(GPU_ARGS); \
	  fi; \
	done; \
	echo "neither $(PYTHON) nor $(BIN)/python has transformers and a torch that sees a GPU: going on with $(VENV)"; \
	make install PYTHON=$(PYTHON) VENV=$(VENV) && exec $(BIN)/python bench/gpu.py $(GPU_ARGS)

# Python 3.12 where one runs (a shim of pyenv's may be on the path and refuse), else $(PYTHON).
OLDEST_PYTHON ?= $(shell for python in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12.*/bin/python; do \
  $$python -c 'import ensurepip, venv' 2>/dev/null && echo $$python && exit; done; echo $(PYTHON))

.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: constraints.txt constraints-%.txt pyproject.toml setup.py
	$(call make_venv,$(if $(filter oldest,$*),$(OLDEST_PYTHON),$(PYTHON)),$(@D))
	differing=$$(sed -nE 's/^([a-z_]+).*/\1/p' constraints-$*.txt | paste -sd '|') && \
	grep -vE "^($$differing)==" constraints.txt | cat - constraints-$*.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c $(@D)/constraints.txt -e '.[test]'
	@touch $@

test-oldest: .venv-oldest/.installed ## Run every test on the oldest supported versions, those that GPU machines carry.
	$(subst $(BIN),$(<D)/bin,$(PYTEST)) -n auto --maxprocesses=4 $(PYTEST_ARGS)

test-newest: .venv-newest/.installed ## Run every test on the newest versions, those that pip takes where none is pinned.
	$(subst $(BIN),$(<D)/bin,$(PYTEST)) -n auto --maxprocesses=4 $(PYTEST_ARGS)
