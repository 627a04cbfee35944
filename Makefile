# make train     set up, then train the embedded detection policy      make train ARGS="--steps 20"   make train NPROC=8
# make test      set up, then run the tests                            make test ARGS="tests/test_matcher.py -k ties"
# make build     set up only: .venv, pinned packages, pr1._C           make build PYTHON=/opt/python3.12/bin/python3.12
# make lint      ruff check and format check
# make clean     remove .venv and everything built
#
# Every target can be interrupted and run again. Set-up does only what is missing or out of date (tools/setup_env.sh).

VENV := .venv
NPROC ?= 1
ARGS ?=
PYTHON ?=
export PYTHON

.PHONY: train test build lint clean

train: build
	$(VENV)/bin/torchrun --nproc_per_node $(NPROC) pr1/train.py --task det $(ARGS)

test: build
	$(VENV)/bin/python -m pytest $(ARGS)

build:
	@sh tools/setup_env.sh

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f pr1/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
