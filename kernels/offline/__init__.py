"""Compiles every Pallas kernel for an H200 on a machine without a GPU, and reports what the compilers made of it.

    python -m kernels.offline                                  lowers attention's Triton kernels; needs only the requirements
    python -m kernels.offline --compile --memory --out=results/offline/attention-h200.json
    python -m kernels.offline --op=scan --compile --out=results/offline/scan-h200.json
    python -m kernels.offline --op=paged --compile --out=results/offline/paged-h200.json
    python -m kernels.offline --op=mosaic --compile --out=results/offline/mosaic-h200.json
    python -m kernels.offline --op=decode --compile --out=results/offline/decode-h200.json

Lowering is what JAX does before XLA compiles, so it finds every operation that Pallas's Triton dialect lacks. `--compile` hands
the IR to Triton's own compiler and ptxas for compute capability 9.0, and reads registers of a thread, bytes that a thread spills,
shared memory of a program, and tensor-core instructions (all, and Hopper's wgmma: HGMMA). XLA carries a Triton of its own, so the
figures are close to what it makes, not the same. It fails where a kernel does what `problems` of its module forbids: an entry of
attention's block table that spills at head size 64 or 128 or lacks tensor-core instructions, a scan that spills or moves more
than 1.3 times the ideal bytes. `--memory` has XLA itself compile forward and backward of causal attention, and reads the
temporary bytes at lengths 1K to 64K. Mosaic GPU kernels (`--op=mosaic` and `--op=decode`, attention's for Hopper) are compiled by
XLA too, so their figures are those of a GPU. All this needs wheels, about 2 GB, in an environment of their own:

    python -m venv H200 && H200/bin/pip install -r requirements.txt triton==3.9.0
    H200/bin/pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V          V: the version of jax there; --memory, mosaic
    JAX_PLATFORMS=cpu H200/bin/python -m kernels.offline --compile --memory
"""
