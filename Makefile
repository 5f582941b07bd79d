# The commands CI runs, by name. All but `venv`, `wheel` and `ci` use the active environment.

# The build CI checks with; a plain `torch` fetches gigabytes of CUDA on Linux.
TORCH ?= torch==2.13.0

.PHONY: venv install test lint types wheel ci example bench figures figures-of-code memory kills left-behind networks scaling conditions docs clean

venv:
	python3 -m venv .venv
	.venv/bin/pip install '$(TORCH)'
	.venv/bin/pip install -e '.[dev]'

install:
	pip install -e '.[dev]'

test:
	python -m pytest -q -n 2

lint:
	ruff check .
	ruff format --check .

types:
	mypy

# The suite against the built wheel, in an environment of its own.
wheel:
	bash .ci/wheel

ci:
	bash .ci/run

example:
	set -e; for script in examples/[a-z]*.py; do python "$$script"; done

# Every picture of README and docs, from scratch; the retrainings of the damping figure take some minutes.
figures:
	python examples/digits.py
	python examples/text.py
	python examples/flipped_labels.py
	python examples/beyond_the_loss.py
	python examples/leave_one_out.py
	python examples/damping.py
	python benchmarks/scaling.py

# The pages of docs/ with a reference of every function, from their docstrings; a warning is an error.
docs:
	python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

bench:
	set -e; for script in benchmarks/[a-z]*.py; do python "$$script"; done

# Lines and tokens of the package; tests/test_code_figures.py holds their bounds.
figures-of-code:
	python benchmarks/code_figures.py

# Peak memory of every solver over max_memory.
memory:
	python benchmarks/memory.py

# Two runs, each killed at 20 random moments and started again.
kills:
	KILLS=20 python -m pytest -q -m "long or not long" tests/run/test_resume.py -k killed

# A hundred calls and constructions in one process, also with exceptions and Ctrl-C: no memory, file or process is left.
left-behind:
	CALLS=100 python -m pytest -q -m 'long or not long' tests/test_left_behind.py

# The suite under python -O, shuffled, with warnings as errors, in float64, from a read-only folder, with NumPy 1.26.
conditions:
	bash .ci/conditions

# What attributions of real architectures cost.
networks:
	python benchmarks/networks.py --quick

# Cost over training samples, test samples and processes, and whether estimates of runs hold.
scaling:
	python benchmarks/scaling.py
	python benchmarks/estimates.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
