#!/usr/bin/env bash
# Everything that CI runs. Expects the dev environment on PATH: `make test`, or a virtual environment that is active.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s\n' "$*"; }
same() { # fail if a command changes the files it is given, as against now
  local before after; before=$(mktemp -d); after="$1"; shift
  cp -r $after "$before/"; "$@"
  for p in $after; do diff -r -q -x __pycache__ -x .ipynb_checkpoints "$before/$(basename "$p")" "$p" || { echo "$p differs after: $*" >&2; rm -rf "$before"; exit 1; }; done
  rm -rf "$before"
}
step "the package is what the notebooks export"; same rsna_helpers nbdev_export
step "the notebooks are clean";                  same nbs nbdev_clean
step "the notebooks run (nbdev_test)";           nbdev_test --timing --do_print
step "pytest";                                   python -m pytest -q tests
