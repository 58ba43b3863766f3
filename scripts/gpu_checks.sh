#!/usr/bin/env bash
# What to run on an NVIDIA GPU, in the order of its worth, for a quarter of an hour: numerics, speed, block sizes, speed again.
# Every part writes after each row and goes on where it stopped, so that this script can be stopped and run again.
# Files: results/<device>/, kernels/numerics/<device>.json, kernels/blocks/<device>.json. Commit them.
#
#     PYTHON=python3 scripts/gpu_checks.sh          the Python with a CUDA build of jax: pip install "jax[cuda13]"
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
device="$("$PYTHON" -c 'from kernels import devices; import jax; assert jax.default_backend() == "gpu", "no GPU here"; print(devices.slug(devices.here()))')"

# 1. Numerics of the whole table, then of the same kernels as tests. A failure is recorded, and the rest still measured.
timeout 240 "$PYTHON" -m benchmarks.attention_numerics --commit || echo "numerics: not passed; mosaic stays by name only"
# 2. Speed of the shapes that the targets are about.
timeout 150 "$PYTHON" -m benchmarks.gpu_attention --head_sizes 128 64 --masks full causal --lengths 4096 16384 || true
timeout 90 "$PYTHON" -m benchmarks.gpu_attention --head_sizes 256 --masks full causal --lengths 4096 || true
timeout 60 "$PYTHON" -m benchmarks.gpu_attention --head_sizes 128 64 --masks bias bigbird --lengths 4096 || true
# 3. Scans: numerics, speed against the bandwidth of a copy; then whole train steps.
timeout 60 "$PYTHON" -m benchmarks.scan_numerics --jobs=8 --commit || echo "numerics: not all scans passed; those stay by name only"
timeout 120 "$PYTHON" -m benchmarks.gpu_scan --jobs=4 --budget=85 --commit || true
timeout 240 "$PYTHON" -m benchmarks.gpu_train --jobs=4 --budget=150 || true
# 4. Decoding: numerics, then bytes by time against the bandwidth of a reduction.
timeout 120 "$PYTHON" -m benchmarks.decode_numerics --jobs=8 --commit || echo "numerics: not passed; decode stays by name only"
timeout 120 "$PYTHON" -m benchmarks.gpu_decode --jobs=4 || true
# 5. Block sizes, of the candidates that compile without spills, and the same shapes again with what is fastest.
timeout 150 "$PYTHON" -m benchmarks.attention_tuning --commit || true
timeout 120 "$PYTHON" -m benchmarks.gpu_attention --head_sizes 128 64 --masks full causal --lengths 4096 16384 \
  --out "results/$device/attention_tuned.json" || true
# 6. Everything else: other lengths, windows, documents, longer biases.
timeout 150 "$PYTHON" -m benchmarks.gpu_attention || true
ls -l "results/$device"
