# Everything here needs Python >= 3.10 (with venv), git and make, and sets up its own virtual environment in .venv.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
# Threads that wait sleep. By default they spin, and where other processes use the cores, that costs more than the work.
export OMP_WAIT_POLICY ?= passive

# Processes that share the tests out among them; each takes a core and up to 2 GB.
JOBS ?= 2

.PHONY: install demo test lint clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: install
	$(VENV)/bin/python scripts/demo.py

test: install
	$(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
