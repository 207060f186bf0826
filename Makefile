# `make` lists the targets. Everything runs in .venv, which each target sets up when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTO_READY := $(PROTO_VENV)/.ready
GENERATED := client/python
# What a change of the proto must not break: the last release, or before the first one the last commit.
PUBLISHED = $(shell git describe --tags --abbrev=0 2>/dev/null || echo HEAD)
.DEFAULT_GOAL := help
.PHONY: help run generate test test-fast lint format type proto proto-check bench soak contact-sheet timeline filmstrip evaluate-model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt service/bundled_model/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: PYTHON=/path/to/python make ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, this is $$($(PYTHON) --version)."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable service/bundled_model --editable '.[server,cli,notebook,dev]'
	@touch $@

$(PROTO_READY): protos/requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement protos/requirements.txt
	@touch $@

run: $(READY) ## start the service with the bundled model; ARGS="--model FOLDER" and so on
	$(BIN)/calotype serve $(ARGS)

generate: $(READY) ## watch a picture form in this terminal; PROMPT="a red apple"
	$(BIN)/calotype generate "$(or $(PROMPT),a red apple)" $(ARGS)

test: lint type proto-check test-fast ## all checks and tests, as CI runs them

test-fast: $(READY) ## only the tests; ARGS="-k name"
	$(BIN)/pytest $(ARGS)

lint: $(READY) ## style, layers, proto
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against '.git#ref=$(PUBLISHED),subdir=protos'

format: $(READY) ## format the code
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format . ; $(BIN)/buf format --write protos

type: $(READY) ## check types
	$(BIN)/mypy

proto: $(PROTO_READY) ## generate the Python code from the proto
	PATH=$(CURDIR)/$(PROTO_VENV)/bin:$$PATH $(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iprotos \
		--python_out=$(GENERATED) --grpc_python_out=$(GENERATED) \
		--mypy_out=quiet:$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) calotype/v1/calotype.proto

proto-check: $(PROTO_READY) ## fail when the generated code is not what the proto gives
	@mkdir -p build/proto && $(MAKE) --no-print-directory proto GENERATED=build/proto
	diff -ru --exclude=__pycache__ build/proto/calotype/v1 client/python/calotype/v1

bench: $(READY) ## measure; prints a table and writes build/bench.json
	PYTHONPATH=tests $(BIN)/python -m benchmarks.bench

soak: $(READY) ## hundreds of requests with every fate, for some minutes; REQUESTS=500 SEED=0
	$(BIN)/pytest tests/soak -s $(ARGS)

evaluate-model: $(READY) ## measure the bundled model; writes build/model.json and build/names.png
	$(BIN)/python service/bundled_model/recipe/evaluate.py --model service/bundled_model/calotype_bundled_model/model \
		--output build/model.json --sheet build/names.png $(ARGS)

contact-sheet: $(READY) ## draw the README's comparison of previews
	PYTHONPATH=tests $(BIN)/python -m benchmarks.contact_sheet

timeline: $(READY) ## draw eight overlapping generations
	PYTHONPATH=tests $(BIN)/python -m benchmarks.timeline

filmstrip: $(READY) ## draw the README's picture
	PYTHONPATH=tests $(BIN)/python -m benchmarks.filmstrip

clean: ## remove what was built, but not the environments
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
