# `make` lists the targets. Everything runs in .venv; each target creates or updates it if necessary.
PYTHON ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
BIN := $(VENV)/bin
PROOFS := $(CURDIR)/build/proofs
READY := $(VENV)/.ready
RAY_READY := $(VENV)/.ray-ready
CLIENT_JS := client/typescript
CLIENT_JS_READY := $(CLIENT_JS)/node_modules/.ready
WEB_READY := web/node_modules/.ready
PAGE := service/calotype_server/page
PROTO_READY := $(PROTO_VENV)/.ready
OVERRIDE := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement overrides.txt
# The folder for generated code.
GENERATED := .
# The proto with its comments, which also describe the HTTP API.
COMMENTS := service/calotype_server/transport/http/proto.binpb
# googleapis-common-protos contains the types of gRPC's error details.
GOOGLEAPIS = $(wildcard $(PROTO_VENV)/lib/python3*/site-packages)
# Node is not listed, because the page needs it too. g++ and a JDK may be installed already.
CLIENT_PACKAGES := make g++ pkg-config protobuf-compiler protobuf-compiler-grpc libprotobuf-dev libgrpc++-dev ruby-grpc ruby-grpc-tools \
	default-jdk-headless libgrpc-java protobuf-compiler-grpc-java-plugin libnetty-java libperfmark-java \
	libgeronimo-annotation-1.3-spec-java libprotobuf-java libgoogle-common-protos-java libgoogle-gson-java libopencensus-java golang-go golang-google-grpc-dev golang-github-golang-protobuf-1-5-dev \
	protoc-gen-go protoc-gen-go-grpc
# Files that are named *.slow.test.ts run in `make test-all`.
VITEST = npm test --silent -- $(if $(FAST),--exclude='**/*.slow.test.ts') --reporter=default --reporter=json --outputFile.json=$(PROOFS)
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
CHECKS := lint type proto-check web-check
ALL_READY := $(READY) $(PROTO_READY) $(CLIENT_JS_READY) $(WEB_READY)
# Two targets at a time; each prints its output when it ends.
TWO_AT_ONCE = $(MAKE) --no-print-directory --jobs=2 --output-sync=target
# A change of the proto must not break the last release, or the last commit if there is no release.
PUBLISHED = $(shell git describe --tags --abbrev=0 2>/dev/null || echo HEAD)
.DEFAULT_GOAL := help
.PHONY: help run generate test test-all test-fast coverage test-clients client-table client-table-check lint format type sync-client proto proto-check web web-check test-web models settings bench bench-gpu gpu-bundle soak ray-up ray-down test-ray bench-ray contact-sheet timeline filmstrip sizing evaluate-model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt overrides.txt service/bundled_model/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: PYTHON=/path/to/python make ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, this is $$($(PYTHON) --version)."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv is missing; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable service/bundled_model --editable '.[server,cli,notebook,dev]'
	$(OVERRIDE)
	@touch $@

# Ray is 240 MB, so only the targets for Ray install it.
$(RAY_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'
	$(OVERRIDE)
	@touch $@

$(PROTO_READY): protos/requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement protos/requirements.txt
	@touch $@

# Only changes to the page or the TypeScript client need Node.
$(CLIENT_JS_READY) $(WEB_READY): %/node_modules/.ready: %/package.json %/package-lock.json
	@command -v node >/dev/null || { echo "Node 20 or newer is needed for $*; on Debian: apt-get install nodejs npm, or see https://nodejs.org."; exit 1; }
	@node -e 'process.exit(Number(process.versions.node.split(".")[0] < 20))' || { echo "Node 20 or newer is needed for $*, this is $$(node --version)."; exit 1; }
	npm ci --prefix $* --no-audit --no-fund --loglevel error
	@touch $@

run: $(READY) ## start the service with the bundled model; ARGS="--model FOLDER" and so on
	$(BIN)/calotype serve $(ARGS)

generate: $(READY) ## generate an image and show it in this terminal; PROMPT="a red apple"
	$(BIN)/calotype generate "$(or $(PROMPT),a red apple)" $(ARGS)

test: $(ALL_READY) ## run the checks and tests that CI runs; the Python tests take about 11 minutes on two cores
	@$(TWO_AT_ONCE) $(CHECKS)
	@$(TWO_AT_ONCE) test-fast test-web FAST=1
	@$(MAKE) --no-print-directory client-table-check FAST=1

test-all: $(ALL_READY) ## run all checks and tests, including slow ones, with the coverage of the Python code
	@$(TWO_AT_ONCE) $(CHECKS)
	@$(MAKE) --no-print-directory coverage
	@$(MAKE) --no-print-directory test-web client-table-check

coverage: $(READY) ## run all Python tests and measure the coverage of their code; fails below the floor in pyproject.toml
	FUZZ=$(or $(FUZZ),900) $(PYTEST) --hypothesis-profile=thorough --cov --cov-report=term:skip-covered $(ARGS)

test-clients: $(READY) ## install the toolchains of the example clients and test all clients; on Debian, as root
	@command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] || { echo "This target installs Debian packages and needs root: $(CLIENT_PACKAGES)"; echo "On other systems, install them yourself, then run: CALOTYPE_TOOLCHAINS=required $(BIN)/pytest tests/e2e/test_examples.py"; exit 1; }
	apt-get update -qq && apt-get install -qq --no-install-recommends $(CLIENT_PACKAGES) >/dev/null
	CALOTYPE_TOOLCHAINS=required $(BIN)/pytest tests/e2e/test_examples.py $(ARGS)

client-table: $(READY) ## write the README's table of clients from the results of their tests
	$(PYTEST) -m proves
	@$(MAKE) --no-print-directory test-web
	PYTHONPATH=tests $(BIN)/python -m support.client_table

client-table-check: $(READY) ## fail if the README's table of clients differs from the test results
	PYTHONPATH=tests $(BIN)/python -m support.client_table --check $(if $(FAST),--fast)

test-fast: $(READY) ## run only the Python tests that are not slow, without Node; ARGS="-k name"
	$(PYTEST) -m "not slow" $(ARGS)

test-web: $(READY) $(CLIENT_JS_READY) $(WEB_READY) ## lint, check and test the TypeScript client and the page, in a real browser
	@test -n "$$CHROMIUM" || command -v chromium google-chrome >/dev/null || { echo "Chromium is needed; on Debian: apt-get install chromium. On other systems: CHROMIUM=/path/to/it make test-web"; exit 1; }
	cd $(CLIENT_JS) && node_modules/.bin/biome ci ../node/generate.js ../connect/generate.ts
	cd $(CLIENT_JS) && npm run --silent lint && npm run --silent type && npm run --silent build && $(VITEST)/typescript.json
	cd web && npm run --silent lint && npm run --silent type && $(VITEST)/web.json

web: $(CLIENT_JS_READY) $(WEB_READY) ## build the page into the Python package
	cd web && PAGE_DIR=$(abspath $(PAGE)) npm run --silent build

web-check: ## fail if the built page is out of date
	@mkdir -p build
	@$(MAKE) --no-print-directory web PAGE=build/page-check >build/page-check.log 2>&1 || { cat build/page-check.log; exit 1; }
	diff -rq build/page-check $(PAGE)

lint: $(READY) ## check style, layers, protos, spelling and plain English
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python client/python/sync_client.py --check
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against '.git#ref=$(PUBLISHED),subdir=protos'
	git ls-files -z | xargs -0 $(BIN)/codespell
	PYTHONPATH=tests $(BIN)/python -m support.plain_english

format: $(READY) ## format the code
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format . ; $(BIN)/buf format --write protos
	@for project in $(CLIENT_JS) web; do [ ! -e $$project/node_modules/.ready ] || npm run --silent --prefix $$project format; done

type: $(READY) ## check types
	$(BIN)/mypy

sync-client: $(READY) ## generate the sync Python client from the asyncio client
	$(BIN)/python client/python/sync_client.py

proto: $(READY) $(PROTO_READY) $(CLIENT_JS_READY) ## generate the Python and TypeScript code from the proto
	$(BIN)/buf generate protos --template protos/buf.gen.yaml --output $(GENERATED)
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iprotos calotype/v1/calotype.proto --grpc_python_out=$(GENERATED)/client/python \
		--include_source_info --descriptor_set_out=$(GENERATED)/$(COMMENTS)
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I$(GOOGLEAPIS) google/rpc/error_details.proto \
		--plugin=$(CLIENT_JS)/node_modules/.bin/protoc-gen-es \
		--es_opt=target=ts,import_extension=js --es_out=$(GENERATED)/$(CLIENT_JS)/src/gen

proto-check: ## fail if the generated code is out of date
	@rm -rf build/proto && mkdir -p build/proto/client/python build/proto/$(CLIENT_JS)/src/gen build/proto/$(dir $(COMMENTS))
	@$(MAKE) --no-print-directory proto GENERATED=build/proto
	diff -ru --exclude=__pycache__ build/proto/client/python/calotype/v1 client/python/calotype/v1
	diff -ru build/proto/$(CLIENT_JS)/src/gen $(CLIENT_JS)/src/gen
	diff build/proto/$(COMMENTS) $(COMMENTS)

models: $(READY) ## write the table of models, service/MODELS.md, from trials of tiny pipelines
	PYTHONPATH=tests $(BIN)/python -m support.models_table >build/MODELS.md
	cp build/MODELS.md service/MODELS.md

settings: $(READY) ## write the table of all settings, service/SETTINGS.md
	$(BIN)/python service/settings_table.py >service/SETTINGS.md

bench: $(READY) ## measure performance; prints a table and writes build/bench.json
	PYTHONPATH=tests $(BIN)/python -m benchmarks.bench

bench-gpu: $(READY) ## measure a GPU with models of real size and random weights; ARGS="--models sd15,flux --budget-seconds 600"
	PYTHONPATH=tests $(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-bundle: $(READY) ## download wheels, to run bench-gpu with tests/benchmarks/gpu/offline.sh on a machine without network
	PYTHONPATH=tests $(BIN)/python -m benchmarks.gpu.bundle $(ARGS)

soak: $(READY) ## load, crashes, injected faults, dead peers, malformed requests; SECONDS=120 (for each of the first two) FUZZ=10000 SEED=0
	FUZZ=$(or $(FUZZ),10000) SCHEMATHESIS=$(or $(SCHEMATHESIS),100) $(BIN)/pytest tests/soak tests/e2e/test_fuzz.py tests/contract/http/test_openapi.py -s $(ARGS)

ray-up: $(RAY_READY) ## start the service with Ray on this machine; CONFIG=service/ray.yaml
	$(BIN)/python service/ray_local.py up $(if $(CONFIG),--config $(CONFIG))

ray-down: $(READY) ## stop the service that ray-up started
	$(BIN)/python service/ray_local.py down

test-ray: $(RAY_READY) $(CLIENT_JS_READY) $(WEB_READY) ## test the service on Ray: kill, freeze and update two replicas; ARGS="-k name"
	$(BIN)/pytest tests/cluster $(ARGS)

bench-ray: $(RAY_READY) ## measure the overhead of Ray; prints a table and writes build/bench-ray.json
	PYTHONPATH=tests $(BIN)/python -m benchmarks.bench_ray

evaluate-model: $(READY) ## measure the bundled model; writes build/model.json and build/names.png
	$(BIN)/python service/bundled_model/recipe/evaluate.py --model service/bundled_model/calotype_bundled_model/model \
		--output build/model.json --sheet build/names.png $(ARGS)

contact-sheet: $(READY) ## draw the README's comparison of previews
	PYTHONPATH=tests $(BIN)/python -m benchmarks.contact_sheet

timeline: $(READY) ## draw eight overlapping generations
	PYTHONPATH=tests $(BIN)/python -m benchmarks.timeline

filmstrip: $(READY) ## draw the README's first picture
	PYTHONPATH=tests $(BIN)/python -m benchmarks.filmstrip

sizing: $(READY) ## simulate fleets and draw service/sizing_*.png; ARGS=--measure measures first, ARGS="--step-ms 1:50,2:60,4:90" simulates another model
	PYTHONPATH=tests $(BIN)/python -m benchmarks.sizing $(ARGS)

clean: ## remove build outputs, but not the environments
	rm -rf build dist $(CLIENT_JS)/dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
