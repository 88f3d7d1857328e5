# Two commands matter: `make serve` chats with a real model on this machine, `make test` runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
TP ?= 2
# Tests start hundreds of processes, each of which would compile our modules again: 0.8 s of a processor for each server.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve observe test quick lint types unit unit-gateway unit-doors unit-engine unit-compile integration \
  integration-doors integration-exact integration-router integration-lifecycle integration-observed integration-faults \
  integration-killed integration-hosts soak test-gpu sanitize goldens proto clean help

help:               ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

serve: $(VENV)/.installed   ## serve the demo model with TP=2 workers on this machine
	@model=$$($(BIN)/python deploy/fetch_demo_model.py) && \
	  exec $(BIN)/tpserve serve "$$model" --tp $(TP) --port $(PORT) --max-num-seqs 8

observe: $(VENV)/.installed   ## the same under a load, with a Prometheus that watches it (apt-get install prometheus)
	@model=$$($(BIN)/python deploy/fetch_demo_model.py) && \
	  exec $(BIN)/python deploy/observe.py "$$model" --tp $(TP) --port $(PORT)

# Two at once: with three, two cores were so busy that answers missed their deadlines. In this order those of hosts and of
# faults, which are in a hurry, run beside what keeps one core busy: Ray, as users start it, gives ranks of hosts nice 15.
# Then the longest come first, so that both cores end at one time.
test: $(VENV)/.dev   ## everything that needs no GPU
	PYTHONPATH=deploy/python $(BIN)/python tests/shared_cache.py
	$(BIN)/python deploy/fetch_demo_model.py
	$(MAKE) --jobs=2 --output-sync=target integration-hosts types lint unit-engine integration-faults unit-compile \
	  integration-doors integration-exact integration-lifecycle integration-router integration-killed unit-gateway \
	  unit-doors integration-observed

# Two of these at once: most of them keep one core busy.
quick: $(VENV)/.dev   ## style, types and unit tests
	PYTHONPATH=deploy/python $(BIN)/python tests/shared_cache.py
	$(MAKE) --jobs=2 --output-sync=target unit-compile unit-engine unit-gateway unit-doors types lint

lint: $(VENV)/.dev   ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev   ## strict types
	$(BIN)/mypy

unit: unit-compile unit-engine unit-gateway unit-doors   ## tests without processes or models

UNIT_GATEWAY := tests/unit/gateway

unit-gateway: $(VENV)/.dev   ## those of the HTTP door
	$(BIN)/pytest $(UNIT_GATEWAY)

UNIT_DOORS := tests/unit/router tests/unit/python_engine tests/unit/chat_cli tests/unit/bench tests/unit/deploy

unit-doors: $(VENV)/.dev   ## those of the other doors, the benchmark and the deployment
	$(BIN)/pytest $(UNIT_DOORS)

UNIT_COMPILE := tests/unit/compile tests/unit/collectives

unit-compile: $(VENV)/.dev   ## those of the compiled library, its kernels and collectives
	$(BIN)/pytest $(UNIT_COMPILE)

unit-engine: $(VENV)/.dev   ## all others
	$(BIN)/pytest tests/unit $(patsubst %,--ignore=%,$(UNIT_GATEWAY) $(UNIT_DOORS) $(UNIT_COMPILE))

# Those of faults run beside those that mostly wait, and those of hosts alone, see `test`.
integration: $(VENV)/.dev   ## tests of the real server with the demo model
	$(BIN)/python deploy/fetch_demo_model.py
	$(MAKE) --jobs=2 --output-sync=target integration-doors integration-exact integration-lifecycle \
	  integration-router
	$(MAKE) --jobs=2 --output-sync=target integration-faults integration-killed integration-observed
	$(MAKE) integration-hosts

INTEGRATION := TPSERVE_DEMO_MODEL=$$($(BIN)/python deploy/fetch_demo_model.py) $(BIN)/pytest -p no:hypothesispytest
INTEGRATION_EXACT := $(addprefix tests/integration/,exact test_dedicated_draft.py test_eagle.py test_speculation.py)
INTEGRATION_ROUTER := tests/integration/router
INTEGRATION_LIFECYCLE := $(addprefix tests/integration/test_,lifecycle.py start_failures.py)
INTEGRATION_OBSERVED := tests/integration/test_observability.py
INTEGRATION_FAULTS := tests/integration/test_faults.py
INTEGRATION_KILLED := tests/integration/test_killed_processes.py
INTEGRATION_HOSTS := tests/integration/test_hosts.py

integration-doors: $(VENV)/.dev   ## those of the doors and the benchmark
	$(INTEGRATION) tests/integration \
	  $(patsubst %,--ignore=%,$(INTEGRATION_EXACT) $(INTEGRATION_ROUTER) $(INTEGRATION_LIFECYCLE)) \
	  $(patsubst %,--ignore=%,$(INTEGRATION_OBSERVED) $(INTEGRATION_FAULTS)) \
	  $(patsubst %,--ignore=%,$(INTEGRATION_KILLED) $(INTEGRATION_HOSTS))

integration-exact: $(VENV)/.dev   ## those of exact answers, with drafts and without
	$(INTEGRATION) $(INTEGRATION_EXACT)

integration-router: $(VENV)/.dev   ## those of replicas behind a router
	$(INTEGRATION) $(INTEGRATION_ROUTER)

integration-lifecycle: $(VENV)/.dev   ## those of starting and ending
	$(INTEGRATION) $(INTEGRATION_LIFECYCLE)

integration-observed: $(VENV)/.dev   ## those of metrics, traces and logs
	$(INTEGRATION) $(INTEGRATION_OBSERVED)

integration-faults: $(VENV)/.dev   ## those that kill and stop ranks
	$(INTEGRATION) $(INTEGRATION_FAULTS)

integration-killed: $(VENV)/.dev   ## those that kill the other processes
	$(INTEGRATION) $(INTEGRATION_KILLED)

integration-hosts: $(VENV)/.dev   ## those of two hosts, one of which is cut off
	$(INTEGRATION) $(INTEGRATION_HOSTS)

soak: $(VENV)/.dev   ## 50 kills of a rank under load: no answer may be lost (5 minutes)
	PYTHONPATH=tests:deploy/python $(BIN)/python benchmarks/kill_soak.py \
	  $$($(BIN)/python deploy/fetch_demo_model.py) --output benchmarks/results/kill_soak.json

test-gpu: $(VENV)/.dev   ## tests that need CUDA devices
	TPSERVE_DEMO_MODEL=$$($(BIN)/python deploy/fetch_demo_model.py) $(BIN)/pytest tests/gpu -m gpu

# racecheck takes what GEMMs and attention rest on for races, see tests/gpu/sanitize.py.
sanitize: $(VENV)/.dev   ## a part of the kernels' tests under compute-sanitizer, on a CUDA device
	for tool in memcheck synccheck initcheck; do $(BIN)/python tests/gpu/sanitize.py $$tool --every 20 -q \
	  $(addprefix tests/gpu/test_,$(addsuffix .py,attention draft_link elementwise gemm gemm_norm gemm_norm_fp8 gemm_silu head mlp \
	    new_tokens qkv_attention sample suffix)) \
	  || exit; done
	$(BIN)/python tests/gpu/sanitize.py racecheck --every 20 -q \
	  $(addprefix tests/gpu/test_,$(addsuffix .py,elementwise head sample suffix))

goldens: $(VENV)/.reference   ## make the committed reference outputs again, with transformers
	$(BIN)/python tests/goldens/make_goldens.py --model $$($(BIN)/python deploy/fetch_demo_model.py)

proto: $(VENV)/.dev   ## regenerate proto/pb
	deploy/protoc.sh

# pip compiles modules on one core, which is half of the time that it takes. Some packages have files that are no Python.
INSTALL := $(BIN)/python -m pip install -c requirements.lock --no-compile
BYTECODE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

$(VENV)/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "pip>=25.1"
	$(INSTALL) -e .
	$(INSTALL) --no-deps xgrammar   # without PyTorch, which it asks for
	$(BYTECODE)
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(INSTALL) --group dev   # of which the larger part is never imported
	touch $@

$(VENV)/.reference: $(VENV)/.dev
	$(BIN)/python -m pip install -c requirements.lock -e '.[reference]'
	touch $@

clean:   ## remove the environment and caches of this checkout
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache
