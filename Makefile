# Everything from a bare clone, with Python 3.11 or newer and nothing else: make demo, make test, and what `make help` tells besides.

PYTHON ?= python3
# A plain torch brings gigabytes of CUDA on Linux where an index offers no other build; pinned, so that it is known.
TORCH ?= torch==2.13.0
OLDEST ?= transformers==5.17.*
WORKERS ?= 2

VENV := .venv
OLDEST_VENV := .venv-oldest
HARNESS_VENV := .venv-harness

# Threads that spin while they wait make tiny models up to a hundred times slower on a busy machine.
export OMP_WAIT_POLICY = PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Tests start many processes: what one compiled, the others need not compile again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-oldest test-harness lint format clean

help:
	@echo "make demo         read 14,000 tokens with and without Everlong (a few minutes; fetches a small model once)"
	@echo "make test         linter, types, all tests, of their parameters' combinations so many that each value of each occurs"
	@echo "make test-all     the same with every combination"
	@echo "make test-oldest  each test under the oldest transformers that is supported, in all families of models"
	@echo "make test-harness the tests of what lm-evaluation-harness runs, which brings many packages of its own"
	@echo "make lint         linter and types only;  make format: rewrite the files as the linter wants them"
	@echo "make clean        remove the virtual environments (models stay: see everlong models)"

demo: $(VENV)/ready
	$(VENV)/bin/everlong demo

# There are as many workers as cores: more than one thread each, and they are in each other's way.
test test-all test-oldest: export OMP_NUM_THREADS = 1

test: lint
	$(VENV)/bin/python -m pytest --thin --numprocesses $(WORKERS)

test-all: lint
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS)

# Models and what is done to them are transformers'; other parameters mean the same under any of its releases.
# Neither benchmarks nor kernels ask more of it than other tests do.
test-oldest: $(OLDEST_VENV)/ready
	$(OLDEST_VENV)/bin/python -m pytest --thin --only-vary family,model,stock \
		--ignore-glob='tests/test_*benchmark*.py' --ignore=tests/kernels --numprocesses $(WORKERS)

# lm-evaluation-harness is not among what the other tests run with: transformers imports some of what it brings.
test-harness: $(HARNESS_VENV)/ready
	$(HARNESS_VENV)/bin/python -m pytest tests/evaluation/test_harness.py

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict src

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Everlong needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

# What $(VENV) has is seen from here, not installed a second time; what is installed here comes before it.
$(OLDEST_VENV)/ready $(HARNESS_VENV)/ready: $(VENV)/ready
	$(VENV)/bin/python -m venv $(@D)
	$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	$(@D)/bin/python -m pip install --quiet $(ADDED)
	touch $@

$(OLDEST_VENV)/ready: ADDED = -e . "$(OLDEST)"
$(HARNESS_VENV)/ready: ADDED = -e ".[harness]"

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(HARNESS_VENV)
