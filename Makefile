# Two commands for a fresh machine: `make demo` and `make test`. Python >= 3.11, git and make are all they need.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
INPUTS ?= 100000

RUN = $(VENV)/bin
INSTALLED = $(VENV)/.installed-offline
DEVELOPED = $(VENV)/.installed-dev

.PHONY: demo test fuzz soak lint format docs clean

demo: $(INSTALLED)
	$(RUN)/lostreg eval sample --root datasets/sample --backbone imgfocus_vits14 --out $(OUT) --plots --overwrite

test: $(DEVELOPED)
	$(RUN)/python -m pytest $(TESTS)

fuzz: $(DEVELOPED)
	LOSTREG_FUZZ=$(INPUTS) $(RUN)/python -m pytest tests/fuzz

soak: $(DEVELOPED)
	$(RUN)/python scripts/demo_soak.py --images datasets/sample

lint: $(DEVELOPED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(DEVELOPED)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

docs: $(INSTALLED)
	$(RUN)/python scripts/update_docs.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet -e ".[offline]"
	@touch $@

$(DEVELOPED): pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet -e ".[offline,dev]"
	@touch $@ $(INSTALLED)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lostreg needs Python >= 3.11, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
