# Needs only Python 3.11 or newer; everything is installed into .venv, at locked versions.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := tests/clients
EXTRA := $(CLIENTS)/.venv-extra/.installed
LANGUAGES := python
ifneq ($(shell command -v npm),)
EXTRA += $(patsubst %,$(CLIENTS)/%/node_modules/.package-lock.json,node node-extra)
LANGUAGES += javascript
endif
# The lock is complete: with --no-deps there is nothing to resolve, and no later release can break the installation.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes
PIP := $(BIN)/python $(INSTALL)

.PHONY: help run test test-clients lint format soak fuzz bench bench-quick lock wheel clean

help:  ## Show this help
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

run: $(VENV)/.run  ## Serve on http://127.0.0.1:8080 (ARGS="--port 9000 --config my.yaml")
	@exec $(BIN)/python -m app serve $(ARGS)

test: $(VENV)/.dev  ## Run the tests, installing what they need (ARGS="-k batcher")
	@$(BIN)/python -m pytest $(ARGS)

test-clients: $(VENV)/.dev $(EXTRA)  ## Run all real clients, installing the heavy ones; JavaScript's if npm is there (ARGS="-k litellm")
	@TEST_CLIENTS="$(LANGUAGES)" $(BIN)/python -m pytest $(CLIENTS) $(ARGS)

lint: $(VENV)/.dev  ## Check formatting, lint and strict types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.dev  ## Format, and fix lint where possible
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

soak: $(VENV)/.dev  ## Run five minutes of traffic while everything around it fails (ARGS="--seconds 60 --seed 7")
	@$(BIN)/python -m tests.soak $(ARGS)

fuzz: $(VENV)/.dev  ## Send a hundred thousand requests that no client would (ARGS="--cases 5000 --seed 7")
	@$(BIN)/python -W ignore -m tests.fuzz $(ARGS)

bench: $(VENV)/.dev  ## Measure against peers and limits; the first run installs the peers (ARGS="--scenarios S1,S4 --peers litellm")
	@$(BIN)/python -m bench $(ARGS)

bench-quick: $(VENV)/.dev  ## Measure against limits only, in under two minutes
	@$(BIN)/python -m bench --quick $(ARGS)

lock: $(VENV)/.dev  ## Update both lock files from pyproject.toml
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate pyproject.toml --output-file requirements.lock
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --constraint requirements.lock --group dev pyproject.toml --output-file requirements-dev.lock

wheel: $(VENV)/.dev  ## Build dist/*.whl
	@rm -rf dist
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## Remove everything installed or built here
	@rm -rf $(VENV) .venv-* dist bench/.peers bench/results .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		$(CLIENTS)/.venv-extra $(CLIENTS)/node/node_modules $(CLIENTS)/node-extra/node_modules

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "this Python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.run: requirements.lock | $(VENV)/bin/python
	@echo "installing what the gateway needs (requirements.lock)"
	@$(PIP) -r requirements.lock
	@touch $@

$(VENV)/.dev: requirements-dev.lock requirements.lock | $(VENV)/bin/python
	@echo "installing what development needs (requirements-dev.lock); the first time takes a minute"
	@$(PIP) -r requirements-dev.lock
	@touch $@ $(VENV)/.run

$(CLIENTS)/.venv-extra/.installed: $(CLIENTS)/requirements-extra.lock | $(VENV)/bin/python
	@echo "installing the heavy clients ($<); the first time takes a minute"
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python $(INSTALL) -r $<
	@touch $@

$(CLIENTS)/%/node_modules/.package-lock.json: $(CLIENTS)/%/package-lock.json
	@echo "installing clients for JavaScript ($<)"
	@cd $(CLIENTS)/$* && npm ci --silent --no-audit --no-fund
	@touch $@
