#!/usr/bin/env bash
# What to run on an NVIDIA GPU, in the order of its worth, about a quarter of an hour: numerics, block sizes, speed.
# Every part writes after each row, and goes on where it stopped as long as the commit is the same ($COMMIT, where the tree was
# copied without its history), so that this script can be stopped and run again, or run in parts: scripts/gpu_checks.sh numerics
# Files: results/<device>/, kernels/numerics/<device>.json, kernels/blocks/<device>.json. Commit them.
#
#     PYTHON=python3 scripts/gpu_checks.sh          the Python with a CUDA build of jax: pip install "jax[cuda13]"
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several processes share the device
jobs=$(($(nproc) > 12 ? 12 : $(nproc)))
device="$("$PYTHON" -c 'from kernels import devices; import jax; assert jax.default_backend() == "gpu", "no GPU here"; print(devices.slug(devices.here()))')"

failed=0
run() { # seconds, module, arguments; the rest is still run where one fails
  echo "== ${*:2}"
  timeout "$1" "$PYTHON" -m "${@:2}" || { echo "ended with $?: ${*:2}"; failed=1; }
}

numerics() { # what passes may become a default on this kind of device; XLA's own choice of kernels takes minutes and is no part of it
  local XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
  export XLA_FLAGS
  run 240 benchmarks.attention_numerics --jobs=$jobs --commit
  run 90 benchmarks.decode_numerics --jobs=$jobs --commit
  run 90 benchmarks.scan_numerics --jobs=$jobs --commit
}

blocks() { # of the candidates that compile without spills
  run 90 benchmarks.attention_tuning --jobs=$jobs --commit
  run 90 benchmarks.scan_tuning --jobs=$jobs --commit
}

attention() { # the shapes that the targets are about, against cuDNN and PyTorch; few processes where scores are held in memory
  run 90 benchmarks.gpu_attention --jobs=$jobs --head_sizes 128 64 256 --masks causal full --lengths 4096 16384 \
    --contestants mosaic cudnn "torch flash" "torch cuDNN"
  local patterns="results/$device/attention_patterns.json"
  run 90 benchmarks.gpu_attention --jobs=4 --head_sizes 128 64 --masks "window 1K" bigbird documents bias --lengths 4096 16384 \
    --contestants mosaic cudnn xla "torch Flex" --out "$patterns"
}

decode() { run 120 benchmarks.gpu_decode --jobs=4; }
scans() { run 150 benchmarks.gpu_scan --jobs=4 --budget=110 --commit; }
training() { run 240 benchmarks.gpu_train --jobs=4 --budget=150; }

everything() { # other lengths and contestants too
  run 300 benchmarks.gpu_attention --jobs=4 --out "results/$device/attention_all.json"
}

parts="numerics blocks attention decode scans training everything"
for part in "$@"; do
  [[ " $parts " == *" $part "* ]] || { echo "no part $part; there are: $parts" >&2; exit 2; }
done
for part in ${*:-$parts}; do $part; done
ls -l "results/$device"
exit $failed
