# Penstock: `make` alone prints what there is. Needs python3 >= 3.11 with venv, and make; everything else is installed into .venv.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Wheels only: building a source package would fetch build tools that no hash pins.
PIP_INSTALL := $(PIP) install --require-hashes --only-binary :all:
# `uv` is needed by `make lock` only, so it has its own environment.
UV_VERSION := 0.13.8
UV_COMPILE = $(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --no-annotate
# Compiled once: a machine whose environment forbids that would do it again in every process.
PYTEST := PYTHONDONTWRITEBYTECODE= ENV_FILE=/dev/null $(BIN)/python -m pytest
# Many tests wait most of their time, for processes, deadlines and browsers; more than this would disturb those that measure time.
TEST_PROCESSES ?= 3
PYTEST_MANY := $(PYTEST) -n $(TEST_PROCESSES) --dist loadgroup
# For example --quick; docs/benchmarks.md has all.
BENCH_OPTIONS ?=
# A production-like environment for `manage.py check --deploy`, with secrets made on the spot.
CHECK_DIR := $(VENV)/check
CHECK_MANAGE := ENV_FILE=$(CHECK_DIR)/env DATA_DIR=$(CHECK_DIR) DATABASE_URL=sqlite://:memory: REDIS_URL= DEBUG=false \
	PUBLIC_URL=https://gateway.example.org ALLOWED_HOSTS=gateway.example.org $(BIN)/python manage.py

##@ Run
.PHONY: run
run: $(VENV)/.installed ## Start everything on SQLite and the embedded Valkey; Ctrl-C stops it
	@$(BIN)/python -m config.launch

.PHONY: dev
dev: $(VENV)/.installed-dev ## The same with autoreload and debug pages (runserver on daphne)
	@$(BIN)/python -m config.launch --dev

##@ Install and build
.PHONY: install
install: $(VENV)/.installed ## Create .venv and install the locked runtime dependencies

.PHONY: build
build: $(VENV)/.installed $(CHECK_DIR)/env ## Collect static files into the data directory and write openapi.yaml
	$(BIN)/python manage.py collectstatic --no-input --verbosity 0
	$(CHECK_MANAGE) spectacular --validate --fail-on-warn --file openapi.yaml

.PHONY: lock
lock: $(VENV)-lock/bin/uv ## Write the lock files anew from pyproject.toml (UPGRADE=1 takes the newest versions)
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --output-file requirements.lock
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --group dev --constraints requirements.lock \
		--output-file tests/requirements.lock

##@ Test and check
.PHONY: test
test: $(VENV)/.installed-dev ## The whole suite on PostgreSQL, then what a database matters to on SQLite; each with a real Valkey
	PENSTOCK_TEST_DATABASE=postgresql $(PYTEST_MANY) -m 'not soak and not alone'
	PENSTOCK_TEST_DATABASE=sqlite $(PYTEST_MANY) -m 'not soak and not alone and not no_database'
	PENSTOCK_TEST_DATABASE=postgresql $(PYTEST) -m 'alone and not soak'
	@echo "make test: passed on PostgreSQL + Valkey, and whatever has to do with a database on SQLite + Valkey, too"

.PHONY: soak
soak: $(VENV)/.installed-dev ## Long runs: load, kill and chaos
	PENSTOCK_TEST_DATABASE=postgresql $(PYTEST) -m soak -rP --timeout 7200

.PHONY: check
check: lint $(CHECK_DIR)/env ## Everything CI checks besides tests
	$(CHECK_MANAGE) check --deploy --fail-level WARNING
	$(CHECK_MANAGE) makemigrations --check --dry-run
	$(CHECK_MANAGE) spectacular --validate --fail-on-warn --file $(CHECK_DIR)/openapi.yaml
	@test ! -f openapi.yaml || cmp openapi.yaml $(CHECK_DIR)/openapi.yaml || \
		{ echo "openapi.yaml is not what the code says: run 'make build' and commit it"; exit 1; }
	PENSTOCK_TEST_DATABASE=sqlite $(PYTEST) -q -n 0 tests/docs

.PHONY: lint
lint: $(VENV)/.installed-dev ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	ENV_FILE=/dev/null $(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.installed-dev ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.installed-dev ## Measure us beside a bare pass-through, in one run on this machine
	ENV_FILE=/dev/null $(BIN)/python -m tests.bench $(BENCH_OPTIONS)

.PHONY: bench-peers
bench-peers: $(VENV)/.installed-dev ## The same beside nginx and other gateways, those that are installed
	ENV_FILE=/dev/null $(BIN)/python -m tests.bench --peers $(BENCH_OPTIONS)

##@ Containers
.PHONY: docker-build
docker-build: ## Build the image
	docker compose build

.PHONY: docker-up
docker-up: ## Start web, worker, beat, drainer, PostgreSQL and Valkey in containers
	@$(PYTHON) -m config.envfile --containers .env
	docker compose up --detach --wait

.PHONY: docker-down
docker-down: ## Stop the containers; the data stays in its volumes
	docker compose down

.PHONY: docker-logs
docker-logs: ## Follow the logs of all containers
	docker compose logs --follow

##@ Help
.PHONY: help
help: ## Print this
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- files -----------------------------------------------------------------------------------------------------------
# Stamps: what is already installed is not looked at again, so the second `make run` starts without pip.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Penstock needs Python 3.11 or newer; say which one with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock | $(BIN)/python
	$(PIP_INSTALL) --requirement requirements.lock
	@touch $@

$(VENV)/.installed-dev: tests/requirements.lock $(VENV)/.installed
	$(PIP_INSTALL) --requirement tests/requirements.lock
	@touch $@

$(VENV)-lock/bin/uv:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip --disable-pip-version-check --quiet install uv==$(UV_VERSION)

$(CHECK_DIR)/env: config/envfile.py | $(BIN)/python
	@mkdir -p $(CHECK_DIR)
	@rm -f $@
	@DATA_DIR=$(CHECK_DIR) DATABASE_URL=sqlite://:memory: $(BIN)/python -m config.envfile $@ >/dev/null
