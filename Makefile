# Everything a reader or a developer types. `make help` lists it.
#
# Variables, given as NAME=value after the target:
SCALE ?= mini
FAST ?=
NB ?=
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2
FUZZ_ARGS ?=
PORT ?= 8000

EXTRAS := notebooks,book,train,phrases,live,guard,dev
BIN := $(VENV)/bin
# what is installed is known by what it was installed from, so neither a checkout nor a clock makes it stale
STAMP := $(VENV)/.ready-$(firstword $(shell cat pyproject.toml constraints.txt hashes.txt | cksum))
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
LLAVA := $(BIN)/llava
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution"
# the first Python that is new enough; PYTHON=... chooses another
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell $(p) -c \
	'import sys; print("$(p)") if sys.version_info >= (3, 11) else None' 2>/dev/null)))

# the miniature's models are small: more threads than one only wait for each other, and two test processes share the cores
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# notebooks, kernels and `llava` must all be this environment's
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup check format test fuzz interop reproduce nb book pdf book2 figures serve lab bench ci lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  SCALE=mini|gpu|a100x8   hardware and data of reproduce and nb (now: $(SCALE))"
	@echo "  FAST=1                  reproduce and nb with the shortest runs that still show every step"
	@echo "  NB=20_feature_alignment the notebook of nb and lab; NB=20 is enough"
	@echo "  PORT=8000               where serve listens, on this machine only"
	@echo "  PYTEST_ARGS='-k name'   what test passes on to pytest (now: $(PYTEST_ARGS))"
	@echo "  PIP_ARGS=...            what setup passes on to pip"

# a folder is written to, or removed, only if it is new, empty, or a virtual environment that does not hold this project
define CHECK_VENV
refuse() { echo "error: VENV=$(VENV): $$1; name another folder, e.g. make setup VENV=.venv" >&2; exit 2; }; \
case "$(VENV)" in "") refuse "no folder";; -*|*[[:space:]]*) refuse "a name that starts with - or has a space";; esac; \
if test -e "$(VENV)" || test -L "$(VENV)"; then \
	test -d "$(VENV)" || refuse "not a folder"; \
	test -f "$(VENV)/pyvenv.cfg" || test -z "$$(ls -A "$(VENV)")" || refuse "not a virtual environment (no pyvenv.cfg)"; \
	case "$$(pwd -P)/" in "$$(cd "$(VENV)" && pwd -P)"/*) refuse "this project is in it";; esac; \
fi
endef

# `git diff` and `git merge` compare notebooks cell by cell (.gitattributes names the drivers), in this clone alone; a
# setting that works, of the user or of an earlier call, is kept, and none names an environment that `make ci` removes
define SET_UP_NBDIME
driver() { old=$$(git config "$$1") && eval "set -- $$old" && command -v "$$1" >/dev/null; }; \
if prefix=$$(git rev-parse --show-prefix 2>/dev/null) && test -z "$$prefix"; then \
	driver diff.jupyternotebook.command || \
		git config --local diff.jupyternotebook.command "'$$(cd $(BIN) && pwd)/git-nbdiffdriver' diff"; \
	driver merge.jupyternotebook.driver || \
		git config --local merge.jupyternotebook.driver "'$$(cd $(BIN) && pwd)/git-nbmergedriver' merge %O %A %B %L %P"; \
fi
endef

setup: $(STAMP) ## make .venv and install everything, pinned; quick when nothing changed

$(STAMP):
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and was not found; install it or say which: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(CHECK_VENV)
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ rm -rf -- "$(VENV)"; $(PYTHON) -m venv "$(VENV)"; } || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV): some minutes the first time" >&2
	@# the files with a hash first; then torch, whose build is the machine's choice, and this project
	@DS_BUILD_OPS=0 $(INSTALL) --no-deps --require-hashes -r hashes.txt $(PIP_ARGS)
	@DS_BUILD_OPS=0 $(INSTALL) -c constraints.txt -e '.[$(EXTRAS)]' $(PIP_ARGS)
	@# pip would compile on one core; files for other versions of Python do not compile, as with pip
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@$(if $(filter .venv-ci,$(VENV)),true,$(SET_UP_NBDIME))
	@touch $@

check: setup ## style, types, notebooks without outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS))

format: setup ## put style right where a tool can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS))

test: setup ## run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

fuzz: setup ## damaged and hostile inputs for ten minutes (FUZZ_ARGS='--seconds 3600 --seed 7 --only checkpoints')
	$(BIN)/python -m tests.fuzz --seconds 600 $(FUZZ_ARGS)

# versions of transformers, each with the first version of tokenizers that it does not take
INTEROP := 4.31:0.14 4.37:0.16 4.51:0.22 4.57:0.23
interop: setup ## tests with older versions of transformers, which it installs into .interop
	@for pair in $(INTEROP); do version=$${pair%:*}; test -d .interop/$$version || $(BIN)/python -m pip install --no-deps \
		--quiet --disable-pip-version-check --target .interop/$$version "transformers~=$$version.0" \
		"tokenizers<$${pair#*:}" "huggingface_hub<1" || exit 1; done
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m interop

reproduce: setup ## every notebook in order, then the book (SCALE=, FAST=1)
	$(LLAVA) reproduce --scale $(SCALE) $(if $(FAST),--fast)

nb: setup ## one notebook (NB=, SCALE=, FAST=1)
	@test -n "$(NB)" || { echo "error: say which notebook, e.g. make nb NB=20_feature_alignment" >&2; exit 2; }
	$(LLAVA) reproduce --scale $(SCALE) $(if $(FAST),--fast) --only $(NB) --book no

book: setup ## build the book from the notebooks that have run
	$(LLAVA) reproduce --scale $(SCALE) --book only

figures: setup ## update figures/, the curated set in git, from the notebooks that have run
	$(BIN)/python -c "from companion.figures import copy_curated; print(*copy_curated(), sep='\n')"

pdf: setup ## the built book as one PDF, book/_build/book.pdf, through Chromium
	$(BIN)/python -m companion.book.pdf

book2: setup ## try Jupyter Book 2, in .venv-book2; it may fail, and says why
	$(BIN)/python tools/book2.py

serve: setup ## show the built book in a browser, on this machine only (PORT=)
	@test -d book/_build/html || { echo "error: no book yet; run make reproduce first" >&2; exit 1; }
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory book/_build/html $(PORT)

# JUPYTER_PATH is searched first: the kernel python3 is this environment's, whatever the user has installed beside it
OPENED = $(firstword $(foreach name,$(or $(NB:.ipynb=),00),$(wildcard $(foreach stem,$(name) $(name)_* 0$(name)_*,notebooks/$(stem).ipynb))))
lab: export JUPYTER_PATH := $(abspath $(VENV))/share/jupyter$(if $(JUPYTER_PATH),:$(JUPYTER_PATH))
lab: setup ## open the overview, or the notebook NB=, in JupyterLab
	@test -n "$(OPENED)" || { echo "error: no notebook $(NB) in notebooks/" >&2; exit 2; }
	$(BIN)/jupyter lab --notebook-dir=notebooks $(if $(filter 0,$(shell id -u)),--allow-root) $(OPENED)

bench: setup ## run every benchmark and append its rows to benchmarks/results/*.csv
	$(BIN)/python -m benchmarks.run --all

ci: VENV := .venv-ci
ci: ## all of the above in a fresh environment, as continuous integration does
	@$(CHECK_VENV)
	rm -rf .venv-ci
	$(MAKE) setup VENV=.venv-ci
	$(MAKE) check VENV=.venv-ci
	$(MAKE) test VENV=.venv-ci
	$(MAKE) reproduce VENV=.venv-ci FAST=1

lock: setup ## write constraints.txt, hashes.txt and environment.yml from pyproject.toml and .venv
	$(BIN)/python tools/lock.py

clean: ## remove build products, except .venv
	rm -rf .venv-book2
	test ! -f .venv-ci/pyvenv.cfg || rm -rf .venv-ci
	rm -rf build dist *.egg-info book/_build book/notebooks data/mini data/features runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
