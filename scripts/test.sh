#!/usr/bin/env bash
# Set up and run the linter and the whole test suite; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ruff check .
ruff format --check .
python -m pytest -n 2 --dist=worksteal "$@"
