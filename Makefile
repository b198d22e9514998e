# Two commands set everything up on a fresh machine: `make demo` runs the demo, `make test` every test.
PYTHON ?= python3
# The reference of the tests. Plain torch brings gigabytes of CUDA: where pip offers a CPU build, this takes it.
TORCH ?= torch==2.13.0
# Neither tests nor benchmarks tell onnxruntime's makers of themselves.
export ORT_DISABLE_TELEMETRY = 1

PIP = -m pip --disable-pip-version-check -q install

.PHONY: demo test test-runtime test-export test-gpu test-transformers5 bench lint model clean

demo: .venv/demo.done  ## Export the demo checkpoint and ask it about a paper: no torch, under 2 minutes
	.venv/bin/ramekin demo

test: test-runtime test-export  ## Every test

test-runtime: .venv-runtime/done  ## The runtime's tests, where torch, transformers and onnx are not installed
	.venv-runtime/bin/python -m pytest tests/runtime

test-export: .venv-test/done  ## The export's tests, against transformers 4 as the reference
	.venv-test/bin/python -m pytest tests

test-gpu: .venv-gpu/done  ## The runtime's tests with onnxruntime for GPUs; it says clearly if there is none
	.venv-gpu/bin/python -m pytest tests/runtime

test-transformers5: .venv-test5/done  ## The same against transformers 5
	.venv-test5/bin/python -m pytest tests/export

bench: .venv-bench/done  ## Every engine on FLAN-T5-large's shape, then the page; two hours. Stop it and take it up again as you like
	.venv-bench/bin/python -m benchmarks run --shape flan-t5-large
	.venv-bench/bin/python -m benchmarks run --shape flan-t5-large --levers
	.venv-bench/bin/python -m benchmarks run --shape flan-t5-large --own
	.venv-bench/bin/python -m benchmarks run --shape flan-t5-large --kernels
	.venv-bench/bin/python -m benchmarks report

lint: .venv-lint/done  ## ruff and mypy
	.venv-lint/bin/ruff check
	.venv-lint/bin/ruff format --check
	.venv-lint/bin/mypy

model: .venv-test/done  ## Make the tiny model of the runtime's tests anew
	.venv-test/bin/python -m tests.make_runtime_model

.venv/demo.done: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e '.[cpu,export]'
	touch $@

.venv-runtime/done: pyproject.toml
	$(PYTHON) -m venv .venv-runtime
	.venv-runtime/bin/python $(PIP) -e '.[cpu]' pytest
	touch $@

.venv-gpu/done: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python $(PIP) -e '.[gpu]' pytest
	touch $@

.venv-test/done: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP) -U 'pip>=25.1'
	.venv-test/bin/python $(PIP) '$(TORCH)'
	.venv-test/bin/python $(PIP) -e '.[cpu,reference]' --group test
	touch $@

.venv-test5/done: pyproject.toml
	$(PYTHON) -m venv .venv-test5
	.venv-test5/bin/python $(PIP) -U 'pip>=25.1'
	.venv-test5/bin/python $(PIP) '$(TORCH)'
	.venv-test5/bin/python $(PIP) -e '.[cpu,export]' 'transformers>=5.23,<6' --group test
	touch $@

.venv-bench/done: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP) -U 'pip>=25.1'
	.venv-bench/bin/python $(PIP) '$(TORCH)'
	.venv-bench/bin/python $(PIP) -e '.[cpu,reference]' --group bench
	touch $@

.venv-lint/done: pyproject.toml
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python $(PIP) -U 'pip>=25.1'
	.venv-lint/bin/python $(PIP) -e '.[cpu]' --group lint
	touch $@

clean:
	rm -rf .venv .venv-*
