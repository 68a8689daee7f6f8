# `make demo` and `make test` set up everything they need in $(VENV); see README.md.
#
# TORCH picks another build of PyTorch than the pinned one, in pip's words, while the environment is
# made: make demo TORCH="torch==2.15.0 --index-url URL"

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
JOBS ?= 2

# Threads that wait sleep: on a busy machine those that spin hold up the ones that work.
export OMP_WAIT_POLICY ?= passive

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-sweep fuzz fuzz-models soak test-gpu test-lowest test-middle test-newest versions \
	quality style bench benchmarks coverage package-check pictures docs clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/python scripts/finetune.py --output-dir runs/demo --compare eager

test: $(INSTALLED)
	rm -f $(VENV)/tests-*.xml
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --junitxml=$(VENV)/tests-1.xml
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) \
		--junitxml=$(VENV)/tests-2.xml tests/test_*.py tests/kernel

# The combinations that `make test` only samples.
test-sweep: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) -m sweep

# The same tests on a GPU: the kernels run on it instead of in Triton's interpreter.
# Most of the time they are compiled, on the CPU: make test-gpu JOBS=16
test-gpu: $(INSTALLED)
	$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("error: PyTorch sees no GPU")'
	rm -f $(VENV)/tests-*.xml
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --junitxml=$(VENV)/tests-1.xml

# The lowest supported versions, in an environment of their own.
test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

# Versions between the lowest and the newest.
test-middle:
	$(MAKE) test VENV=.venv-middle CONSTRAINTS=constraints-middle.txt

# Whatever the package index has today: it fails where a new release needs work.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

# The record of tested versions and docs/versions.md: enters the last run of the tests in VENV.
versions: $(INSTALLED)
	$(BIN)/python scripts/versions.py $(VENV)/tests-*.xml

# Random calls against the dense formula; a failure prints the seed that repeats it:
# make fuzz CASES=10000 FUZZ="--kernel triton --first 7"
CASES ?= 3000
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/fuzz.py --count $(CASES) $(FUZZ)

# Random batches through whole models against each document alone.
fuzz-models: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore tests/hf/fuzz_models.py \
		--count $(CASES) $(FUZZ)

# Random calls of training sizes on a Hopper GPU, against the portable kernels; JOBS processes.
soak: $(INSTALLED)
	$(BIN)/python -W ignore tests/soak.py --count 500 --jobs $(JOBS) $(FUZZ)

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python scripts/benchmark.py

# docs/benchmarks.md from the runs in docs/benchmarks; scripts/benchmarks_page.py enters a new one.
benchmarks: $(INSTALLED)
	$(BIN)/python scripts/benchmarks_page.py

# docs/coverage.md: every family of Transformers against eager; goes on where it was interrupted.
coverage: $(INSTALLED)
	$(BIN)/pip install -q -c $(CONSTRAINTS) scipy
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.coverage --jobs $(JOBS)

# Wheel and sdist in dist/: what they hold, and the wheel in an empty environment.
package-check:
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install -q build twine
	.venv-package/bin/python scripts/package_check.py $(if $(TORCH),--torch "$(TORCH)")

# docs/masks: the pictures of docs/masks.md.
pictures: $(INSTALLED)
	$(BIN)/python scripts/mask_pictures.py

# build/site: README.md and docs as a site, in an environment of its own. Warnings are errors.
docs: .venv-docs/.installed
	.venv-docs/bin/sphinx-build -W --keep-going -q -c docs/site . build/site

.venv-docs/.installed: docs/site/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -r $<
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-middle .venv-newest .venv-docs .venv-package runs build dist

$(INSTALLED): $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	$(BIN)/pip install $(TORCH)
	sed -E '/^(torch|triton)==/d' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/pip install -c $(VENV)/constraints.txt -e '.[test]'
else
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[test]'
endif
	touch $@
