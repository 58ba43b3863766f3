#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated and plotted model: multi-query recall in about three minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
python train.py --config=configs/quickstart.py --workdir=runs/quickstart "$@"
python eval.py --workdir=runs/quickstart
python -m efficient_attn.reporting.curves --workdirs=runs/quickstart --out=runs/quickstart/curve.png
