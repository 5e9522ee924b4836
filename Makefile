# Two commands for a fresh machine: `make demo` and `make test`. Python >= 3.11, git and make are all they need.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
# Tests whose outcome may hang on old releases; not those of whole models, of memory and of processes that are killed.
CORE = $(addprefix tests/,methods models inference images exports runs cli/test_cli.py artifacts/test_gram.py) \
	-k "not full_size and not less_memory and not killed"
OUT ?= out
INPUTS ?= 100000

RUN = $(VENV)/bin
INSTALLED = $(VENV)/.installed-offline
DEVELOPED = $(VENV)/.installed-dev

.PHONY: demo test test-lowest fuzz soak lint format docs site wheel clean

demo: $(INSTALLED)
	$(RUN)/lostreg eval sample --root datasets/sample --backbone imgfocus_vits14 --out $(OUT) --plots --overwrite

test: $(DEVELOPED)
	$(RUN)/python -m pytest $(TESTS)

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest $(or $(TESTS),$(CORE))

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

# The variable silences an announcement of Material's; links that lead nowhere, and other warnings, are errors.
site: $(DEVELOPED)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

wheel: $(DEVELOPED)
	$(RUN)/python -m build
	$(RUN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(LOWEST) $(OUT) build dist site *.egg-info

$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet -e ".[offline]"
	@touch $@

$(DEVELOPED): pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet -e ".[offline,dev]"
	@touch $@ $(INSTALLED)

# The oldest release of each package that pyproject.toml allows, and of what these need the newest that fits.
$(LOWEST)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -e ".[heif,offline,test]"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lostreg needs Python >= 3.11, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
