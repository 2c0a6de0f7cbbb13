# make demo    sets up and runs the main job on two CPU cores      make quick   the tests but for the slow ones, 4 minutes
# make desk    the paper's mask comparison in half an hour at most  make test    all tests, 14 minutes
# make setup   .venv with everything the tests need                make lint    style, import order, layering

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# With huge pages a step of the tiny preset takes a quarter less: its memory is fresh each time (docs/speed.md).
CPU := JAX_PLATFORMS=cpu GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: setup demo desk quick test lint clean

# Stamps, so that a second run installs nothing; they are older than what says what to install when it has changed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created setup.py constraints.txt
	@echo "installing the package (a few minutes the first time)"
	$(PIP_INSTALL) --editable ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.created setup.py constraints.txt
	@echo "installing the package and what its tests need (a few minutes the first time)"
	$(PIP_INSTALL) --editable ".[demo,test]"
	@touch $@ $(VENV)/.demo

$(VENV)/.desk: $(VENV)/.created setup.py constraints.txt
	@echo "installing the package (a few minutes the first time)"
	$(PIP_INSTALL) --editable ".[desk]"
	@touch $@

setup: $(VENV)/.test

# Each step goes on where it stopped: a demo that was interrupted, or that has run before, starts nothing over.
demo: $(VENV)/.demo
	$(CPU) $(BIN)/python -m mask2dit_jax.build_data --output=data/demo
	$(CPU) $(BIN)/python -m mask2dit_jax.train --config=configs/pretrain.py:tiny --workdir=workdir/pretrain
	$(CPU) $(BIN)/python -m mask2dit_jax.train --config=configs/sft.py:tiny --workdir=workdir/sft
	$(CPU) $(BIN)/python -m mask2dit_jax.sample --config=configs/sample.py:tiny --output=demo
	$(CPU) $(BIN)/python -m mask2dit_jax.evaluate --story=demo --shots=data/demo/pretrain.csv

# Goes on where it stopped, too. Other findings: --finding=NAME, see docs/desk.md.
desk: $(VENV)/.desk
	$(CPU) $(BIN)/python experiments/desk --finding=table2 --output=desk

# Two processes: most of these tests compile small programs, which keeps one core busy. The files of a process share what
# their fixtures make, and the long ones come first (tests/conftest.py).
PYTEST := $(CPU) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: setup
	$(PYTEST) -m "not slow"

test: setup
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info demo desk data workdir
