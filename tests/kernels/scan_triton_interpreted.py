"""Runs the Triton kernels of the selective scan in Triton's interpreter, on NumPy arrays, against the reference on the CPU.

    TRITON_INTERPRET=1 python tests/kernels/scan_triton_interpreted.py        needs Triton, neither a GPU nor PyTorch

Prints the largest error of every output and gradient relative to its size, in float32, and fails above 1e-5. It is a process of
its own because Triton reads that variable when it is imported.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels.scan import selective_blocks, selective_reference, triton, triton_kernels
from kernels.scan.selective_blocks import Blocks, Gradients, Passes
from kernels.scan.selective_reference import Inputs, keeps

BLOCKS = Blocks(2, 4, 4, 4, 1)
# L, groups, reverse, packed, bare
CASES = [(6, 2, True, True, False), (4, 1, False, False, True), (9, 1, False, True, False), (1, 1, False, False, False)]


class Tensor:
    """What Triton's interpreter asks of a tensor: where its numbers lie, and of what type they are."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *size, device):
        return Tensor(self.array)

    def set_(self, *view) -> None:
        """The view is always of the whole array, which is there already."""

    def storage_offset(self) -> int:
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def copy_(self, other) -> None:
        assert other.array is self.array, "the interpreter wrote to another array"


def launch(kernel, plan, inputs: Inputs, arguments) -> list[np.ndarray]:
    """Run `kernel` interpreted, on what `triton.forward_arguments` or `triton.backward_arguments` made."""
    arrays, outputs, constants = arguments
    found = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
    B, _, G, F = inputs.u.shape
    tensors = [Tensor(np.ascontiguousarray(x)) for x in arrays] + [Tensor(x) for x in found]
    kernel[(F // plan.blocks.channels, G, B)](*tensors, **constants)
    return found


def forward(plan, inputs: Inputs, keep, with_states: bool):
    return launch(triton_kernels.forward, plan, inputs, triton.forward_arguments(plan, inputs, keep, with_states))


def backward(plan, inputs: Inputs, keep, kept, dy, dlast) -> Gradients:
    arguments = triton.backward_arguments(plan, inputs, keep, kept, dy, dlast)
    d = Gradients(*map(jnp.asarray, launch(triton_kernels.backward, plan, inputs, arguments)))
    given = {"z": inputs.z, "D_parts": inputs.D, "delta_bias_parts": inputs.delta_bias}
    return d._replace(**{name: None for name, x in given.items() if x is None})


def case(L: int, G: int, reverse: bool, packed: bool, bare: bool, B=2, F=3, N=3):
    """Inputs, keep and two cotangents."""
    rng = np.random.default_rng(0)
    shapes = Inputs((B, L, G, F), (B, L, G, F), (G, N, F), (B, L, G, N), (B, L, G, N), (G, F), (B, L, G, F), (G, F), (B, G, N, F))
    inputs = Inputs(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    inputs = inputs._replace(A=-jnp.exp(inputs.A))
    if bare:
        inputs = inputs._replace(D=None, z=None, delta_bias=None, delta=jnp.exp(inputs.delta))
    keep = keeps(jnp.asarray(rng.random((B, L)) < 0.3), reverse, jnp.float32) if packed else None
    cotangents = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shapes.u, shapes.h0))
    return inputs, keep, cotangents


def errors(L: int, G: int, reverse: bool, packed: bool, bare: bool) -> dict[str, float]:
    """Relative to the largest number of each array."""
    inputs, keep, cotangents = case(L, G, reverse, packed, bare)
    reference = jax.jit(functools.partial(selective_reference.scan, not bare, reverse))
    (y, last), pullback = jax.vjp(lambda x: reference(x, keep), inputs)
    (expected,) = pullback(cotangents)

    plan = triton.plan_of(not bare, reverse, inputs, BLOCKS)
    run = functools.partial(selective_blocks.run, Passes(forward, backward), plan)
    (our_y, our_last), pullback = jax.vjp(lambda x: run(x, keep), inputs)
    (found,) = pullback(cotangents)
    pairs = {"y": (our_y, y), "h_last": (our_last, last)}
    pairs |= {name: (getattr(found, name), value) for name, value in expected._asdict().items() if value is not None}
    return {name: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for name, (a, b) in pairs.items()}


def main() -> None:
    worst = 0.0
    for arguments in CASES:
        found = errors(*arguments)
        print(arguments, "  ".join(f"{name} {error:.1e}" for name, error in found.items()), flush=True)
        worst = max([worst, *(error if np.isfinite(error) else np.inf for error in found.values())])
    sys.exit(0 if worst < 1e-5 else f"an error of {worst:.1e}")


if __name__ == "__main__":
    main()
