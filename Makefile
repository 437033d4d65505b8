# Everything works from a fresh clone: the first target that needs it makes .venv and installs into it.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
TRL := .venv-trl
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
CODE := src tests benchmarks examples evidence docs
# Scripts are not annotated; what is left tells calls of the library that its code does not know any more.
LOOSE := arg-type assignment attr-defined call-overload dict-item index method-assign misc operator return-value \
	union-attr unused-ignore var-annotated

# Nothing asks a hub, and started processes find compiled code. The rest is for machines with few cores: threads that
# wait do not spin, and memory that each step frees and asks for again does not go back to the system in between.
TUNED := HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 \
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
QUIET := LLAMAFACTORY_VERBOSITY=WARN TRANSFORMERS_VERBOSITY=error

# Tests go by file to one process per core; each takes about 2 GB. WORKERS=0 runs them all in one.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count(), 4) if os.cpu_count() > 1 else 0)')
ALONE = $(TUNED) $(QUIET) $(RUN) -m pytest -q
PYTEST = $(ALONE) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-trl test-oldest check lint types pytest format docs site bench peers fuzz kills \
	evidence evidence-quick lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

# LOCK=1 installs the versions that the tests were run with, torch apart, which each machine has a build of its own of.
LOCKED := $(if $(LOCK),--constraint requirements.lock)

demo: $(VENV)/.installed  ## install (LOCK=1: versions of requirements.lock), then train a small model with and without selection (about 7 minutes)
	@$(RUN) examples/demo.py

test: $(VENV)/.installed-dev lint types pytest test-trl  ## install, then linter, type checker and all tests
	@echo "== make test: all passed"

test-quick: $(VENV)/.installed-dev  ## tests that train nothing and take less than a second each
	$(PYTEST) -m "not slow and not gloo and not trains" --hypothesis-profile quick

test-trl: $(TRL)/.installed  ## tests of trainers with the current TRL, in an environment of their own
	@echo "== pytest: current TRL"
	$(subst $(RUN),$(TRL)/bin/python,$(PYTEST)) tests/huggingface

# The test that is left out is of what attention keeps for the backward pass, which newer versions of torch made less.
test-oldest: $(OLDEST)/.installed  ## the quick tests with the oldest versions that pyproject.toml allows
	@echo "== pytest: oldest versions"
	$(TUNED) $(QUIET) $(OLDEST)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not slow and not gloo and not trains" --hypothesis-profile quick \
		--deselect tests/config/test_memory.py::test_activations_of_a_layer_are_those_that_autograd_keeps

check: lint types  ## linter, formatting and type checker, without tests
	$(RUN) -m ruff format --check $(CODE)

lint: $(VENV)/.installed-dev
	@echo "== ruff"
	$(RUN) -m ruff check $(CODE)

types: $(VENV)/.installed-dev
	@echo "== mypy"
	$(RUN) -m mypy
	$(RUN) -m mypy --explicit-package-bases --ignore-missing-imports --follow-imports silent --allow-untyped-defs \
		--allow-incomplete-defs $(LOOSE:%=--disable-error-code %) benchmarks examples

pytest: $(VENV)/.installed-dev
	@echo "== pytest: two ranks, one launch at a time"
	$(ALONE) -m gloo
	@echo "== pytest: one process"
	$(PYTEST) -m "not gloo"

format: $(VENV)/.installed-dev  ## rewrite the code in the project's format
	$(RUN) -m ruff check --fix $(CODE)
	$(RUN) -m ruff format $(CODE)

docs: $(VENV)/.installed-dev  ## render docs/methods.md from the methods' classes
	$(RUN) docs/render_methods.py

site: $(VENV)/.installed-dev  ## build the site of the documentation into runs/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench: $(VENV)/.installed  ## all benchmarks
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(TUNED) $(RUN) $$file; done

peers: $(VENV)/.installed  ## measure beside other systems, each in an environment of its own (hours; fetches packages)
	$(RUN) -m benchmarks.vs_peers

SEED ?= 1
fuzz: $(VENV)/.installed-dev  ## plan 500 random configurations and train what is accepted (SEED=, COUNT=; half an hour)
	$(TUNED) $(QUIET) $(RUN) -m benchmarks.soak.fuzz --seed $(SEED) --count $(or $(COUNT),500)

kills: $(VENV)/.installed-dev  ## kill runs 300 times and compare what goes on; watch memory over 700 intervals (hours)
	$(TUNED) $(QUIET) $(RUN) -m benchmarks.soak.kills --seed $(SEED) --count $(or $(COUNT),300)
	HF_HUB_OFFLINE=1 $(QUIET) $(RUN) -m benchmarks.soak.growth

SUITES := aa s1 s2 s3 m1 m1_ledger m2_grid m2 m3 w1
COMPARE = $(TUNED) $(QUIET) OMP_NUM_THREADS=1 $(RUN) -m dataflex compare --jobs 2

evidence: $(VENV)/.installed  ## train and compare the suites of evidence/ (many hours; SEEDS=2 takes fewer), and render docs/results.md
	$(RUN) evidence/data.py
	@set -e; for name in m1_reference m1_proxy m2_reference m2_proxy m3_reference m3_proxy w1_reference; do test -f runs/evidence/$${name}/config.json || \
		$(TUNED) $(QUIET) $(RUN) -m dataflex train evidence/$${name}.yaml; done
	@set -e; for suite in $(SUITES); do $(COMPARE) evidence/$$suite.yaml $(if $(SEEDS),seeds=$(SEEDS)); done
	$(TUNED) $(QUIET) $(RUN) -m dataflex audit evidence/audit.yaml
	$(RUN) evidence/render.py

evidence-quick: $(VENV)/.installed  ## one small suite of the same kind
	$(RUN) evidence/data.py
	$(COMPARE) evidence/quick.yaml
	$(RUN) evidence/render.py

# torch and what comes with it stay out: their builds are a machine's.
lock: $(VENV)/.installed-dev  ## renew requirements.lock from what is installed
	$(RUN) -m pip install --quiet uv
	$(RUN) -m pip freeze --exclude-editable > $(VENV)/installed.txt
	$(RUN) -m uv pip compile --quiet --universal --no-header --no-annotate --python-version 3.11 \
		--extra llamafactory --extra report --constraint $(VENV)/installed.txt pyproject.toml | \
		grep -vE '^(torch|torchvision|torchaudio|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' > $(VENV)/lock.txt
	mv $(VENV)/lock.txt requirements.lock

clean:  ## remove the virtual environments, the runs and the caches
	rm -rf $(VENV) $(TRL) $(OLDEST) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: a second call installs nothing, a changed pyproject.toml installs again.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "== installing dataflex and what it needs into $(VENV) (several minutes the first time)"
	$(RUN) -m pip install --editable '.[llamafactory,report]' $(LOCKED)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "== installing dataflex and its development tools into $(VENV) (several minutes the first time)"
	$(RUN) -m pip install --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# LLaMA-Factory pins an older TRL: here a current one lies over what the other environment has.
$(TRL)/.installed: $(VENV)/.installed-dev
	@echo "== installing the current TRL into $(TRL)"
	$(RUN) -m venv --clear $(TRL)
	@$(TRL)/bin/python -c 'import pathlib, site, sys; pathlib.Path(site.getsitepackages()[0], "below.pth").write_text(sys.argv[1])' \
		"import site; site.addsitedir('$$($(RUN) -c 'import site; print(site.getsitepackages()[0])')')"
	$(TRL)/bin/python -m pip install --quiet --no-warn-conflicts 'trl>=1.16'
	@touch $@

# uv alone can ask for the oldest versions of what we ask for. The rest are the newest, where they still go together:
# torchaudio does not say which torch it is built for, and matplotlib's old calls of pyparsing are warned of.
$(OLDEST)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "== installing the oldest versions into $(OLDEST)"
	$(RUN) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/python -m uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		--editable '.[dev]' 'torchaudio>=2.5,<2.6' 'pyparsing>=3.0.9,<3.1'
	@touch $@
