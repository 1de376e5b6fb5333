# make train    sets up .venv and aligns the embedded tiny model (ARGS="--seed 1" and the like are passed on)
# make test     sets up .venv and runs every test
PYTHON ?= python3

.PHONY: train test
train: .venv/installed
	.venv/bin/torchrun train.py $(ARGS)

test: .venv/installed-tests
	.venv/bin/python -m pytest $(ARGS)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt tests/requirements-no-deps.txt
	.venv/bin/pip install -q -r tests/requirements.txt
	.venv/bin/pip install -q --no-deps -r tests/requirements-no-deps.txt
	touch $@
