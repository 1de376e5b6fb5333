PYTHON ?= python3

.PHONY: help train check test faults mutants gpu-mutants soak bench

help:           ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: .venv/installed          ## align the embedded tiny model; ARGS="--seed 1" and the like are passed on
	.venv/bin/torchrun train.py $(ARGS)

check: .venv/installed-tests    ## the linter: the rules of ruff.toml
	.venv/bin/ruff check

test: check                     ## the linter, then every test, in two processes; ARGS="tests/test_train.py" picks some
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

mutants: .venv/installed-tests  ## change the method's code in a thousand ways: do the tests notice?
	.venv/bin/python tests/mutants.py $(ARGS)

gpu-mutants: .venv/installed-tests      ## change the GPU path in 80 ways: does the dry run notice? 15 minutes on 2 cores
	.venv/bin/python tests/gpu_mutants.py $(ARGS)

faults: .venv/installed-tests   ## 180 faults on one and two ranks: is anything lost? ARGS="SIGTERM judge" picks by words; 15 minutes on 2 cores
	.venv/bin/python tests/faults.py $(ARGS)

soak: .venv/installed           ## 2,000 steps: memory, time, metrics, learning rate; ARGS="--ranks 2"; 3 minutes
	.venv/bin/python tests/soak.py $(ARGS)

bench: .venv-bench/installed    ## measure against TRL and Liger, write the table: 30 minutes on 2 cores, 24 GB
	.venv-bench/bin/python -m benchmarks.step
	.venv-bench/bin/python -m benchmarks.step --vocab 128256 --trl_batches 1 2 \
		--output benchmarks/step-128k.json
	.venv-bench/bin/python -m benchmarks.head
	.venv-bench/bin/python -m benchmarks.scaling
	.venv-bench/bin/python -m benchmarks.table --write

# Each command sets up what it needs, and again where the requirements have changed.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt tests/requirements-no-deps.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	.venv/bin/pip install -q --no-deps -r tests/requirements-no-deps.txt
	touch $@

.venv-bench/installed: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q -r benchmarks/requirements.txt
	.venv-bench/bin/pip install -q --no-deps liger-kernel==0.8.5
	touch $@
