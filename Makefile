# `make demo` and `make test` need Python 3.11+ and nothing else; both make .venv themselves and reuse it. The tests look at pages
# in Chromium: `make test` takes the one that is there or installs one (see `browser`).
#
# PyPI's torch for Linux brings CUDA along (some GB). On a machine without a GPU the small CPU build does:
#   make demo PIP_TORCH='--index-url https://download.pytorch.org/whl/cpu torch>=2.9,<2.14'

MODEL ?= tiny
PIP_TORCH ?= torch>=2.9,<2.14
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

BIN := .venv/bin
# What pip and its helpers say goes here; VERBOSE=1 shows it, and all that the demo's libraries say.
INSTALL_LOG := .venv/install.log
ifdef VERBOSE
DEMO_FLAGS := --verbose
else
SILENT := @
TO_LOG := >> $(INSTALL_LOG) 2>&1 || { tail -n 20 $(INSTALL_LOG) >&2; exit 1; }
endif
# --no-compile: most of these files are never imported; launchers/warm_up.py compiles the others.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

.PHONY: help demo test browser test-slow test-gpu site lint format clean

help:
	@echo 'make demo [MODEL=tiny|smollm2] [VERBOSE=1]  prepare MovieLens-100K, train, evaluate, export, score'
	@echo 'make test                       every check that CI runs'
	@echo 'make test-slow | test-gpu       the tests that take minutes | need CUDA'
	@echo 'make site                       the documentation, in build/site'
	@echo 'make lint | format | clean      static checks | rewrite the layout | remove .venv and caches'

demo: .venv/installed
	$(SILENT)$(BIN)/python launchers/demo.py --model $(MODEL) $(DEMO_FLAGS)

# Two processes: a file's tests stay together, and each process has one Ray cluster and one S3 server.
test: lint browser
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

# The one on PATH, or that CTRSINK_CHROMIUM names, or Playwright's; else root installs Debian's, and others Playwright's.
browser: .venv/installed-dev
	@$(BIN)/python -m tests.services.browser > /dev/null 2>&1 \
		|| { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell; } \
		|| $(BIN)/playwright install chromium-headless-shell

test-slow: .venv/installed-dev
	$(BIN)/pytest -m slow

test-gpu: .venv/installed-dev
	$(BIN)/pytest -m gpu

# What is made from the code first: the keys of a configuration, the verbs of the command line.
site: .venv/installed-dev
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'build/site/index.html'

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/created:
	@test -n "$(PYTHON)" || { echo 'ctrsink needs Python 3.11 or newer: install it, or name one with make PYTHON=/path/to/python3' >&2; exit 1; }
	$(SILENT)$(PYTHON) -m venv .venv
	$(SILENT)$(PIP) --upgrade pip $(TO_LOG)
	@touch $@

.venv/installed: EXTRAS := train,gguf
.venv/installed-dev: EXTRAS := train,serve,study,gguf,mlflow,docs,dev
# Torch has a line of its own, so that another index or a local build can be chosen for it alone.
.venv/installed .venv/installed-dev: .venv/created pyproject.toml
	@echo 'installing torch into .venv (1 of 3, minutes; what pip says is in $(INSTALL_LOG))'
	$(SILENT)$(PIP) $(foreach word,$(PIP_TORCH),'$(word)') $(TO_LOG)
	@echo 'installing ctrsink with $(EXTRAS) (2 of 3, minutes)'
	$(SILENT)$(PIP) -e '.[$(EXTRAS)]' $(TO_LOG)
	@echo 'compiling what every process would compile (3 of 3, a minute)'
	$(SILENT)$(BIN)/python launchers/warm_up.py > /dev/null $(if $(TO_LOG),2>> $(INSTALL_LOG) || { tail -n 20 $(INSTALL_LOG) >&2; exit 1; })
	@touch .venv/installed $@
