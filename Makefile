# Everything people and CI run. PYTHON may name another interpreter; VENV another place.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: setup check test bench demo web demo-web test-web test-android test-ios
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
	$(MAKE) test-web
	$(MAKE) test-android

# The browser page: Node.js 20 or newer. Vite's output is web_demo/dist; the bundle is the embedded model. Tests hold the
# page against Python on one without int8, where another processor's rounding is not amplified (and headless Chromium's
# WebGPU adapter has no float16).
WEB_BUNDLE = out/shapes-onnx-web.edgesd
FLOAT_BUNDLE = out/quality/shapes-onnx-web.edgesd
WEIGHTS = $(wildcard edgesd/models/shapes/*/*)
WEB_SOURCES = $(shell find web_demo/src web_demo/public -type f) web_demo/index.html web_demo/bench.html web_demo/vite.config.ts

# The lock's versions, by `npm install`: `npm ci` refuses a lock without the binaries of other platforms.
web_demo/node_modules/.ready: web_demo/package.json web_demo/package-lock.json
	cd web_demo && npm install --no-save --no-audit --no-fund --loglevel=error
	touch $@

web_demo/dist/index.html: web_demo/node_modules/.ready $(WEB_SOURCES)
	cd web_demo && npm run --silent build

web: web_demo/dist/index.html

$(WEB_BUNDLE)/manifest.json: $(WEIGHTS) | setup
	$(BIN)/edgesd package --target onnx-web -o out --force

$(FLOAT_BUNDLE)/manifest.json: $(WEIGHTS) | setup
	$(BIN)/edgesd package --target onnx-web --profile quality -o out/quality --force

demo-web: setup web $(WEB_BUNDLE)/manifest.json
	$(BIN)/edgesd serve $(WEB_BUNDLE)

# End-to-end tests need a Chromium: Debian's is installed for root, everybody else gets a line that says so.
test-web: setup
	@command -v npm >/dev/null || { echo "web_demo: tests skipped, no Node.js 20 or newer"; exit 0; }; \
	if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core >/dev/null; fi; \
	$(MAKE) web $(WEB_BUNDLE)/manifest.json $(FLOAT_BUNDLE)/manifest.json && cd web_demo && export EDGESD_PYTHON="$(abspath $(BIN)/python)" && npm test --silent && npm run --silent test:e2e

# The Kotlin runtime and its app (docs/android.md).
test-android: setup
	@if command -v java > /dev/null; then $(BIN)/python android_demo/check.py; \
	else echo "test-android skipped: no java here (Debian: apt-get install default-jre-headless)"; fi

# edgesd beside its peers (docs/benchmarks.md): many hours, and the same line goes on where it stopped.
# BENCH="--model small --parts unet,picture --hours 3" chooses. 75: visits are left when the hours are over.
BENCH_WORK = out/bench
BENCH =
bench: setup
	-$(BIN)/python benchmarks/bench.py peers $(BENCH_WORK)
	$(BIN)/python benchmarks/bench.py measure $(BENCH_WORK) $(BENCH) || [ $$? = 75 ]
	$(BIN)/python benchmarks/bench.py report $(BENCH_WORK)

# The Swift package on Linux: docs/ios.md.
test-ios:
	ios_demo/test-linux.sh
