# make train    sets up .venv and aligns the embedded tiny model (ARGS="--seed 1" and the like are passed on)
# make test     sets up .venv and runs every test
# make bench    sets up .venv-bench, times steps and the vocabulary head against TRL and Liger, and rewrites the README's table:
#               half an hour on 2 cores and 24 GB
PYTHON ?= python3

.PHONY: train test bench
train: .venv/installed
	.venv/bin/torchrun train.py $(ARGS)

test: .venv/installed-tests
	.venv/bin/python -m pytest $(ARGS)

bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/step.py
	.venv-bench/bin/python benchmarks/step.py --vocab 128256 --trl_batches 1 2 --output benchmarks/step-128k.json
	.venv-bench/bin/python benchmarks/head.py
	.venv-bench/bin/python benchmarks/scaling.py
	.venv-bench/bin/python benchmarks/table.py --write

.venv-bench/installed: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q -r benchmarks/requirements.txt
	.venv-bench/bin/pip install -q --no-deps liger-kernel==0.8.5
	touch $@

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt tests/requirements-no-deps.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	.venv/bin/pip install -q --no-deps -r tests/requirements-no-deps.txt
	touch $@
