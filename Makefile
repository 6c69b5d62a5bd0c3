# All targets set up what they need in a fresh clone: a virtual environment with the tested versions, in .venv.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

FLOORS := .floors
# Rollouts, policies of both families, training, evaluation, checkpoints, what is saved, the command line
CORE := tests/test_config.py tests/test_rollout.py tests/test_policies.py tests/test_trainer.py tests/test_cli.py::test_recipe_trains_and_options_override_it

# Nothing is compiled as it is installed, but what is imported is, once
export PYTHONDONTWRITEBYTECODE :=
INSTALL := pip install --quiet --no-compile

.PHONY: demo test test-floors check docs package lock

demo: $(READY)          ## train the bundled toy model for a few minutes and show what it learned, in demo/
	$(VENV)/bin/trl-tpgrpo demo

test: $(READY)          ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-floors:            ## run the core tests on the oldest versions, in the environment that make package leaves
	$(FLOORS)/bin/python -m $(INSTALL) $$(grep -E "^(hypothesis|pytest|pytest-xdist|tensorboard)==" requirements.lock)
	OMP_NUM_THREADS=1 $(FLOORS)/bin/pytest -n 2 --dist loadfile $(CORE)

check: $(READY)         ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)          ## write the tables from the source and build the site into outputs/site; a broken link is an error
	$(VENV)/bin/python docs/tables.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

package: $(READY)       ## build sdist and wheel in dist/, and try them beside the oldest versions of what they need
	.ci/package

lock: $(READY)          ## write the versions that are installed to requirements.lock
	$(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

$(READY): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m $(INSTALL) --requirement requirements.lock
	$(VENV)/bin/python -m $(INSTALL) --no-deps --editable .
	touch $(READY)
