# make demo | test | check | style | bench. VENV chooses the virtual environment, PYTHON the interpreter that makes it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEITTINY ?= ../shared/data/deit-tiny-imagenet

.PHONY: demo test check style bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python recipes/vit.py recipes/configs/digits.yaml

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python recipes/bench/step.py $(DEITTINY) --output recipes/bench/results/step-deit-tiny.json

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
