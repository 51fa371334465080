# make demo    set everything up and answer a question about an image by SWIRES
# make test    set everything up and run the tests      make lint    ruff and mypy
# make bench   the search benchmark                     make info    what was built
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

demo: $(VENV)/.ready
	$(VENV)/bin/llava-cot demo

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/bench_search.py --questions 3

info: $(VENV)/.ready
	$(VENV)/bin/python -m llava_cot_kernels.info

# The extension is built against the torch of the environment, so torch comes first.
$(VENV)/.ready: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(TRANSFORMERS)" -e ".[test]"
	touch $@

clean:
	rm -rf .venv* build *.egg-info llava_cot_kernels/*.so

.PHONY: demo test lint bench info clean
