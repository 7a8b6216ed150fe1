#!/usr/bin/env bash
# Makes .venv if it is missing, then runs the linter and every test. Options go to pytest, such as
#   bash run_tests.sh -m "not slow"
#   bash run_tests.sh -m gpu -n 0       # what needs a GPU; all other tests run on the CPU
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
prepare requirements-test.txt
.venv/bin/python -m ruff check .
# Some tests start processes, and threads would compete for the cores: tests take one thread unless
# OMP_NUM_THREADS says otherwise. Two workers take the tests in turn; -n 0 runs them in one process
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
