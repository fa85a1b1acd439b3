# One command each; every target sets up .venv first. `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3
override PYTHON := $(or $(shell command -v $(PYTHON)),$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(VENV)/.medft  ## .venv from requirements-cpu.txt, and medft itself, editable

# Two stamps: the packages are installed again only when the lock changes, medft when its metadata does.
$(VENV)/.packages: requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "medft needs Python 3.11 or later, and $(PYTHON) is '$$($(PYTHON) -V 2>&1)'. Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "==> $(VENV), with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> packages of requirements-cpu.txt: seconds with a warm pip cache, else a download of about 1 GB"
	@$(BIN)/python -m pip install --quiet --no-deps --no-compile -r requirements-cpu.txt   # compiling all of it first takes a minute
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "==> this torch is a CUDA build and needs its libraries (head of requirements-cpu.txt: how to get the CPU build)"; \
	    $(BIN)/python -m pip install $$(grep '^torch==' requirements-cpu.txt); }
	@touch $@

$(VENV)/.medft: $(VENV)/.packages settings.ini setup.py pyproject.toml
	@echo "==> medft, editable"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: install  ## the whole story in a few minutes, offline: data, two trainings, verdict, model card
	@medft run quickstart

# Two cores: the notebooks and the tests named here run beside the other tests, which takes half the time away.
BESIDE := $(addprefix tests/,project/test_site.py data/test_sources.py starter/test_starter.py cli/test_track.py train/test_train.py plan/test_plan.py fast/test_quick.py cli/test_run.py evaluate/test_scoring.py export/test_export.py)
PYTEST := OMP_NUM_THREADS=1 python -m pytest -q -rs -m "not long" --durations 10
test: install  ## every test but the long ones: format, notebooks and package agree, every notebook runs, pytest
	@.ci/lint
	@.ci/same
	@echo "==> notebooks and some of the tests run beside the others; their results follow"
	@{ .ci/notebooks; nbs=$$?; $(PYTEST) $(BESIDE); exit $$((nbs || $$?)); } >$(VENV)/beside.log 2>&1 & beside=$$!; trap 'kill $$beside 2>/dev/null' INT TERM; \
	    $(PYTEST) tests $(BESIDE:%=--ignore=%); tests=$$?; \
	    wait $$beside; rest=$$?; cat $(VENV)/beside.log; exit $$((tests || rest))

test-long: install  ## simulations, kill matrices, parity runs: nightly, and before an issue is closed
	@OMP_NUM_THREADS=1 python -m pytest tests -q -rs -m long --durations 10

docs: quarto install  ## the site, into _docs/
	@nbdev-docs

readme: install  ## README.md from nbs/index.ipynb
	@.ci/readme

# nbdev would fetch and install Quarto with sudo; that is not for a build to decide.
quarto:
	@command -v quarto >/dev/null || { echo "this needs Quarto 1.7.34 or later on the PATH: see quarto.org (the site check of 'make test' does without)" >&2; exit 1; }

LOCK = uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --python-platform x86_64-manylinux_2_28 --python-version 3.11
lock-gpu: install  ## resolve requirements-gpu.txt anew from settings.ini (needs uv)
	@{ sed -n '/^#/p' requirements-gpu.txt; $(LOCK) --constraint <(grep '^torch==' requirements-cpu.txt) --extra unsloth --extra dev pyproject.toml; } >$(VENV)/lock
	@mv $(VENV)/lock requirements-gpu.txt

clean:  ## remove what builds and tests leave; keeps .venv and runs/
	@rm -rf build dist *.egg-info _proc _docs _site .pytest_cache .hypothesis .quarto
	@find medft nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

.PHONY: help install quickstart test test-long docs readme quarto lock-gpu clean
