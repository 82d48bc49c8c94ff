#!/usr/bin/env bash
# What a card does with the library: at most eight minutes, results in benchmarks/results/NAME.json.
#   bash benchmarks/card.sh NAME           on the card
#   bash benchmarks/card.sh NAME --small   a trial of small size on whatever there is
set -euo pipefail
name=${1:?usage: card.sh NAME [--small]}
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/card.py --out "$name" "$@"
