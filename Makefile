# Everything runs from a fresh clone: each target makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Keep freed memory in the process: on virtual machines page faults are costly for small training steps.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296

.PHONY: demo test lint bench clean

demo: $(INSTALLED)  ## fine-tune the bundled model on clean and on contaminated data, watched
	$(BIN)/qscope demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/encode.py

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[trl,tensorboard,cli,dev]"
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
