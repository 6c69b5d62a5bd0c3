# All targets set up what they need in a fresh clone: a virtual environment with the tested versions, in .venv.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test check docs package lock

demo: $(READY)          ## train the embedded model for a few minutes and show what it learned, in demo/
	$(VENV)/bin/trl-tpgrpo demo

test: $(READY)          ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

check: $(READY)         ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)          ## build the site into outputs/site; a broken link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

package: $(READY)       ## build sdist and wheel in dist/, and try them in an environment of their own
	.ci/package

lock: $(READY)          ## write the versions that are installed to requirements.lock
	$(VENV)/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

$(READY): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $(READY)
