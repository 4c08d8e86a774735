#!/usr/bin/env bash
# Set up emtool with its test tools, then lint, type-check and test it.
#
#   scripts/test.sh          the default tests, 3 to 7 minutes on two cores after installation
#   scripts/test.sh --all    the slow ones too: a real model, a Ray cluster, an empty environment; 10 to 20 minutes
#   scripts/test.sh [--all] ARGUMENTS...   further arguments go to pytest, -n0 for instance: one process
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh

selection=()
if [ "${1:-}" = --all ]; then
    shift
    selection=(-m "not gpu and not network")
fi
echo "emtool tests: installation (2 minutes, once), lint, types, tests (3 to 7 minutes; with --all 10 to 20)."
setup_env dev
say "ruff"
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
say "mypy, strict"
.venv/bin/mypy
say "pytest"
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    echo "no chromium and chromedriver (Debian: chromium, chromium-driver): the tests of the report's page are skipped"
fi
.venv/bin/python -m pytest ${selection[@]+"${selection[@]}"} "$@"
