#!/usr/bin/env bash
# Makes .venv if it is missing, then runs every test and the linter. Options go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source environment.sh
prepare requirements-test.txt
.venv/bin/python -m ruff check .
# Tests start processes of their own: one thread each, or they fight for the cores
OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
