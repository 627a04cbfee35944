# make train     set up, then train an embedded policy     make train TASK=ocr   make train ARGS="--steps 20"   make train NPROC=8
# make test      set up, then run the tests                            make test ARGS="tests/test_matcher.py -k ties"
# make build     set up only: .venv, pinned packages, pr1._C           make build PYTHON=/opt/python3.12/bin/python3.12
# make warmstart  make pr1/assets/ anew, the policies `make train` begins with (well over an hour)
# make lint      ruff check and format check
# make clean     remove .venv and everything built
#
# Every target can be interrupted and run again. Set-up does only what is missing or out of date (tools/setup_env.sh).

VENV := .venv
NPROC ?= 1
TASK ?= det
ARGS ?=
PYTHON ?=
export PYTHON

.PHONY: train test build warmstart lint clean

train: build
	$(VENV)/bin/torchrun --nproc_per_node $(NPROC) pr1/train.py --task $(TASK) $(ARGS)

test: build
	$(VENV)/bin/python -m pytest $(ARGS)

build:
	@sh tools/setup_env.sh

# Easy scenes first (from random weights harder ones teach nothing), then harder ones; last, annotations of which six in
# ten objects are marked twice: the policy learns to repeat itself, a habit known of fine-tuned models, for RL to unlearn.
# The other tasks begin with detection's policy and end the same way.
WARM := build/warmstart
SFT := $(VENV)/bin/torchrun pr1/sft.py --train-vision --beta2 0.98 --eval-samples 400 --max-new-tokens 120
warmstart: build
	rm -rf $(WARM)
	$(VENV)/bin/python -m pr1.tiny $(WARM)/random
	$(SFT) --task det --model $(WARM)/random --run-dir $(WARM)/1 --difficulty 0 --steps 400 --lr 1.5e-3 --warmup-steps 50
	$(SFT) --task det --model $(WARM)/1/checkpoints/step-400 --run-dir $(WARM)/2 --steps 1400 --lr 1.5e-3 --warmup-steps 50 --schedule cosine
	$(SFT) --task det --model $(WARM)/2/checkpoints/step-1400 --run-dir $(WARM)/3 --steps 1600 --lr 1.5e-3 --warmup-steps 50 --schedule cosine
	$(SFT) --task det --model $(WARM)/3/checkpoints/step-1600 --run-dir $(WARM)/4 --steps 200 --lr 5e-4 --warmup-steps 20 --duplicates 0.6
	$(VENV)/bin/python -m pr1.tiny $(WARM)/tiny-qwen2.5-vl --weights $(WARM)/4/checkpoints/step-200
	$(MAKE) $(WARM)/tiny-qwen2.5-vl-ground $(WARM)/tiny-qwen2.5-vl-count $(WARM)/tiny-qwen2.5-vl-ocr
	rm -rf pr1/assets/tiny-qwen2.5-vl* && cp -r $(WARM)/tiny-qwen2.5-vl* pr1/assets/

$(WARM)/tiny-qwen2.5-vl-ground $(WARM)/tiny-qwen2.5-vl-count: $(WARM)/tiny-qwen2.5-vl-%:
	$(SFT) --task $* --model $(WARM)/tiny-qwen2.5-vl --run-dir $(WARM)/$*-1 --steps 700 --lr 1e-3 --warmup-steps 30 --schedule cosine
	$(SFT) --task $* --model $(WARM)/$*-1/checkpoints/step-700 --run-dir $(WARM)/$*-2 --steps 120 --lr 4e-4 --warmup-steps 10 --duplicates 0.6
	$(VENV)/bin/python -m pr1.tiny $@ --weights $(WARM)/$*-2/checkpoints/step-120

$(WARM)/tiny-qwen2.5-vl-ocr:
	$(SFT) --task ocr --model $(WARM)/tiny-qwen2.5-vl --run-dir $(WARM)/ocr-1 --steps 1200 --lr 1.5e-3 --warmup-steps 50 --schedule cosine
	$(SFT) --task ocr --model $(WARM)/ocr-1/checkpoints/step-1200 --run-dir $(WARM)/ocr-2 --steps 150 --lr 5e-4 --warmup-steps 20 --duplicates 0.6
	$(VENV)/bin/python -m pr1.tiny $@ --weights $(WARM)/ocr-2/checkpoints/step-150

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f pr1/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
