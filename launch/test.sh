#!/usr/bin/env bash
# Installs with the test extra and runs the tests, a file a process; --full runs the whole matrix. Other words go to
# pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export LAMELLA_EXTRAS=test
. launch/install.sh
select=(-m "not full")
if [ "${1:-}" = --full ]; then
  shift
  select=()
fi
exec python -m pytest -n auto --maxprocesses 4 --dist loadfile ${select[@]+"${select[@]}"} "$@"
