# Two commands for a newcomer: `make quickstart` and `make test`. Both install into .venv first, once.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export VENV

# Two ranks where the machine has two GPUs, or, without a GPU, two cores.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
RANKS ?= $(shell n=$(GPUS); [ $$n -gt 0 ] || n=$(CORES); [ $$n -ge 2 ] && echo 2 || echo 1)
THREADS := $(shell n=$$(( $(CORES) / $(RANKS) )); [ $$n -gt 0 ] && echo $$n || echo 1)
# A GPU machine without a network uses its own Python where there is no .venv.
GPU_PYTHON ?= $(if $(wildcard $(STAMP)),$(BIN)/python,python3)

.DEFAULT_GOAL := help
METHODS := base full lora lora_mlp dora llama_pro lape rcn caneft
ROUTED := base few_shot adapter lora adapter_lora full layers ls lg landermt

.PHONY: help install quickstart compare compare-pairs test lint format bench kernels-report gpu gpu-record gpu-peers gpu-run tune faults fuzz doctor comet-env

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

install: $(STAMP) ## make .venv and install slicetune and its tests' tools into it

$(STAMP): pyproject.toml setup.py constraints.txt .ci/install
	@.ci/install

quickstart: $(STAMP) ## the main job on the embedded model and corpus: scores, neurons, training, BLEU
	@echo "[quickstart] CANEFT on the embedded model and corpus, $(RANKS) process(es): recipes/caneft_tiny.py"
	@echo "[quickstart] the first run pretrains the small model and keeps it in ~/.cache/slicetune"
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) recipes/caneft_tiny.py $(ARGS)

compare: $(STAMP) ## all nine methods on the embedded model and corpus, one table, about 10 minutes
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m slicetune.engine compare \
		$(METHODS:%=recipes/%_tiny.py) --out runs/compare-tiny $(ARGS)

compare-pairs: $(STAMP) ## LANDeRMT's ten rows on the embedded model of two directions, one table
	OMP_NUM_THREADS=$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m slicetune.engine compare \
		$(ROUTED:%=recipes/%_pairs_tiny.py) --out runs/compare-pairs-tiny $(ARGS)

test: lint ## style and all tests
	@echo "[test] pytest"
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

faults: $(STAMP) ## every fault in full, about an hour, in pieces: tests/faults/FAULTS.md; broken off, it goes on
	$(BIN)/python tests/faults/campaign.py $(ARGS)

fuzz: $(STAMP) ## random and damaged input, N of each kind (default 2000), drawn anew
	SLICETUNE_FUZZ=$(or $(N),2000) $(BIN)/python -m pytest tests/faults/test_fuzz.py --timeout 0 $(ARGS)

# COMET wants transformers < 5 and numpy < 2, which has no wheels for a Python after 3.12; --evaluate.comet finds it here.
comet-env: $(STAMP) ## .venv-comet, COMET's own environment, for --evaluate.comet
	sh -ec "$$($(BIN)/python -c 'from slicetune.engine.evaluation.comet import setup; print(setup())')"

doctor: $(STAMP) ## what this machine can do; what a bug report needs
	$(BIN)/python -m slicetune.engine doctor

lint: $(STAMP) ## style: ruff check and format --check
	@echo "[lint] ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels-report: $(STAMP) ## compile every kernel for five GPUs, none needed: bench/results/kernels.md
	$(BIN)/python -m slicetune.kernels.compile

bench: $(STAMP) ## benchmarks on the CPU, about 10 minutes: bench/RESULTS.md
	$(BIN)/python bench/run.py cpu --plots $(ARGS)

# On a GPU: from a plain checkout, without a network. The machine's Python wants torch triton transformers peft sacrebleu
# pytest pytest-xdist pytest-benchmark (and what they need); what else there is comes from WHEELS=DIR, a folder of *.whl.
# OUT=DIR is the folder of all that is written. Each ends in time with what there is: ARGS="--seconds 120" for less.
GPU_RUN = $(GPU_PYTHON) bench/run.py $@ $(if $(OUT),--out $(OUT)) $(ARGS)

gpu: ## on a GPU, 240 s: kernel tests, kernels, optimizer, a whole step, which targets are met
	$(GPU_RUN)

gpu-record: ## on a GPU, 280 s: the figures to keep, with the 8B on 24 GB and every method
	$(GPU_RUN)

gpu-peers: ## on a GPU, 280 s: against torch.compile, DoRA, SHiRA, Liger (WHEELS: liger-kernel)
	$(GPU_RUN)

gpu-run: ## on a GPU, 280 s: one recipe end to end, one rank (WHEELS: tyro deepspeed sacrebleu, what they want)
	$(GPU_RUN)

tune: ## on a GPU, 240 s: which tiles are best where that is in doubt, and the lines to change
	$(GPU_RUN)
