# Each target works from nothing but Python 3.11+, make and a package index.
PYTHON ?= python3
PIP_FLAGS ?= --quiet --disable-pip-version-check

.PHONY: run test test-slow lint docs clean .venv

# The main job: train ResNet-20 on the embedded data set; a table, and a report with plots in runs/digits.
# Huge pages spare a CPU a tenth of its time and more (experiments/results/benchmark.md).
run: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
run: .venv
	.venv/bin/python experiments/train.py --config=configs/digits.py:resnet20 --workdir=runs/digits

# In as many processes as there are cores, up to four; the tests of a file share compiled functions.
# In the files' order: by their numbers of tests a long one could come last, and one process wait.
test: lint
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: .venv
	.venv/bin/python -m pytest -m slow

lint: .venv
	.venv/bin/ruff check .
	.venv/bin/mypy

# The documentation, in docs/_build; a warning is an error.
docs: .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) --editable '.[docs]'
	.venv/bin/python -m sphinx -W --keep-going -q docs docs/_build

.venv: .venv/.ready

# Built anew when the dependencies change, or when the last installation did not come to its end.
.venv/.ready: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "resvariants needs Python 3.11 or later; name one with make PYTHON=python3.x")'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) --editable '.[test]'
	touch .venv/.ready

clean:
	rm -rf .venv runs build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
