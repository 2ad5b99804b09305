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

PROMPT = a red circle above a blue square on a white background
TARGETS = onnx-web openvino tflite coreml

demo: setup
	$(BIN)/edgesd package --target all -o out --force
	for target in $(TARGETS); do \
	  $(BIN)/edgesd generate "$(PROMPT)" --seed 3 -m out/shapes-$$target.edgesd -o out/$$target.png || exit; \
	done

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup
	$(BIN)/python benchmarks/loop_overhead.py
