# The same commands on a laptop and in CI.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-ray test-others soak lint bench bench-batch bench-online bench-coserving bench-jobs bench-gpu wheel clean

demo: .venv/.installed
	$(BIN)/tandem demo

# Those with a Ray wait for nodes and leases a third of their time, which the others use
test: lint
	$(MAKE) --jobs 2 --output-sync test-ray test-others

test-ray:
	$(BIN)/pytest -m "ray and not soak"

test-others:
	$(BIN)/pytest -m "not ray and not soak"

soak: .venv/.installed-dev
	$(BIN)/pytest -m soak -s tests/test_soak.py

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every figure that the README and docs/ quote, hours on 2 cores; bench-gpu where there is a GPU.
bench: bench-batch bench-online bench-coserving bench-jobs

bench-batch: .venv/.installed-dev
	$(BIN)/python benchmarks/batch.py --s3
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/start.py

bench-online: .venv/.installed-dev
	$(BIN)/python benchmarks/online.py
	$(BIN)/python benchmarks/hold.py

bench-coserving: .venv/.installed-dev
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/coserving.py

bench-jobs: .venv/.installed-dev
	$(BIN)/python benchmarks/scale.py --folder /dev/shm --shards 2000 --images 100
	$(BIN)/python benchmarks/scale.py --folder /dev/shm --shards 20000 --images 100
	$(BIN)/python benchmarks/scale.py --folder /dev/shm --shards 100000 --no-data
	$(BIN)/python benchmarks/listing.py --shards 100000
	$(BIN)/python benchmarks/resume.py

bench-gpu: .venv/.installed-dev
	$(BIN)/python benchmarks/gpu.py

wheel: .venv/.installed-dev
	$(BIN)/pip wheel -q --no-deps --wheel-dir dist .

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
