# `make demo` and `make test` set everything up by themselves on a fresh machine; the first call takes minutes.
VENV ?= .venv
BIN := $(VENV)/bin
# Demo, tests and benchmarks here run on the CPU; `make JAX_PLATFORMS=cuda bench` measures a GPU. (With libtpu installed
# for the ahead-of-time tests, JAX would otherwise look for a TPU first.)
export JAX_PLATFORMS ?= cpu

# Quick tests of what most changes touch; none of them compiles a student for long.
QUICK := config runtime pool rendering selection judging report diagnostics test_repository.py test_run.py

.PHONY: demo test check lint bench config-reference clean

demo: $(VENV)/ready
	$(BIN)/python -m lark_jax.run --config=configs/tiny.py

# Two processes, a file each at a time: most of the time is XLA compiling, one core after the other.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# For the inner loop: lint, types and quick tests.
check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(addprefix tests/,$(QUICK))

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

config-reference: $(VENV)/ready
	$(BIN)/python -m lark_jax.config.reference >docs/config.md.new
	mv docs/config.md.new docs/config.md

bench: $(VENV)/ready
	$(BIN)/python scripts/bench_token_statistics.py --out build/bench_token_statistics.json
	$(BIN)/python -m lark_jax.run --config=configs/tiny.py --config.stages=prepare
	$(BIN)/python scripts/bench_scoring.py --student=runs/tiny/prepare/pretrain/student \
		--pool=runs/tiny/prepare/data/pool.jsonl --out=build/bench_scoring.json
	$(BIN)/python -m pip install --quiet -e '.[torch,bench]'
	$(BIN)/python scripts/bench_finetuning.py --student=runs/tiny/prepare/pretrain/student --trajectories=16 \
		--out=build/bench_finetuning.json

$(VENV)/ready: pyproject.toml scripts/setup.sh
	bash scripts/setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build runs/tiny
