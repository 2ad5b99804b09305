# Everything people and CI run. PYTHON may name another interpreter; VENV another place.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: setup check test bench demo
# torch comes first and by version: a range would pull CUDA builds where the CPU build is wanted. The constraints are the
# versions tested together; without them pip searches long.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/edgesd package --target all -o out --force
	$(BIN)/edgesd generate "a red circle above a blue square on a white background" -m out/shapes-onnx-web.edgesd -o out/picture.png

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup
	$(BIN)/python benchmarks/run.py
