# Every target sets up what it needs in .venv by itself, so `make test` in a fresh clone is enough.
# Stamps inside .venv make the second call instant; a changed pyproject.toml runs pip again.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# More arguments: make quickstart ARGS="--out /tmp/q", make test ARGS="-k rotary"
ARGS ?=
# Where torch comes from. On Linux, PyPI's wheel brings several GB of CUDA libraries; the CPU one:
#   make test TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_FLAGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CORE := $(VENV)/.installed-core
TEST := $(VENV)/.installed-test
# CTranslate2 opens what is exported; its converter wants transformers < 5, so an environment of its
# own.
CT2_VENV ?= .venv-ct2
CT2 := $(CT2_VENV)/.installed
# Bergson, TransformerLens and kronfluence, whose gradients ours are compared with, and
# compressed-tensors, with which transformers opens our int8. Bergson and kronfluence also want
# torchvision, which nothing here needs (pip will say so): they come without what they name.
PEERS_VENV ?= .venv-peers
PEERS := $(PEERS_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
	  | while IFS='|' read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

quickstart: $(CORE) ## text to tokens to a trained, evaluated, exported model, on a CPU
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/pythia-jax quickstart $(ARGS)

test: lint ## lint, and every test but the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout 900 $(ARGS)

test-all: lint $(CT2) $(PEERS) ## lint, and every test
	CT2_VENV=$(CT2_VENV) PEERS_VENV=$(PEERS_VENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout 3600 -m "" $(ARGS)

lint: $(TEST) ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(TEST) ## a training step of ours beside one of transformers + torch
	$(BIN)/python benchmarks/train_step.py $(ARGS)

clean: ## remove caches and build outputs; leaves .venv and runs/ alone
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# pip is what `venv` installs last: where it exists, the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "$(PYTHON) is Python %d.%d; pythia_jax needs 3.11 or newer: make PYTHON=python3.12 ..." % v[:2])'
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml | $(BIN)/pip
	@echo "installing pythia_jax and its dependencies into $(VENV)"
	@$(PIP_INSTALL) --editable .
	@touch $@

# torch first and alone: so its pin decides which build is taken, whatever else wants a torch.
$(TEST): pyproject.toml | $(BIN)/pip
	@echo "installing pythia_jax, its dependencies and the test tools into $(VENV) (some minutes)"
	@$(PIP_INSTALL) $(TORCH_FLAGS) torch==2.13.0
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $(CORE) $@

$(CT2):
	@echo "installing CTranslate2 and the transformers that it reads with into $(CT2_VENV)"
	@$(PYTHON) -m venv $(CT2_VENV)
	@$(CT2_VENV)/bin/python -m pip install --quiet $(TORCH_FLAGS) torch==2.13.0
	@$(CT2_VENV)/bin/python -m pip install --quiet 'ctranslate2>=4.8' 'transformers>=4.50,<5' accelerate safetensors click
	@touch $@

$(PEERS):
	@echo "installing Bergson, TransformerLens, kronfluence and compressed-tensors into $(PEERS_VENV) (some minutes)"
	@$(PYTHON) -m venv $(PEERS_VENV)
	@$(PEERS_VENV)/bin/python -m pip install --quiet $(TORCH_FLAGS) torch==2.13.0
	@$(PEERS_VENV)/bin/python -m pip install --quiet --no-deps bergson==2.5.1 kronfluence==1.0.1
	@$(PEERS_VENV)/bin/python -m pip install --quiet torch==2.13.0 transformer-lens==4.3.0 \
	  'transformers>=5.0' accelerate datasets jaxtyping ml_dtypes natsort numpy scipy 'peft>=0.17' \
	  petname pyarrow pyyaml simple-parsing torchopt bitsandbytes 'huggingface-hub>=1.13.0' \
	  einconv einops opt_einsum compressed-tensors==0.20.0
	@touch $@
