#!/usr/bin/env bash
# Makes .venv if it is missing, then runs the linter and every test. Options go to pytest, such as
#   bash run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
prepare requirements-test.txt
.venv/bin/python -m ruff check .
# Some tests start processes: one thread each, so that they do not compete for the cores. Two workers
# take the tests in turn; -n 0 runs them in one process
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
