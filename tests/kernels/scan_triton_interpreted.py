"""Runs the Triton kernels of the selective scan and SSD in Triton's interpreter, on NumPy arrays, against the references.

    TRITON_INTERPRET=1 python tests/kernels/scan_triton_interpreted.py        needs Triton, neither a GPU nor PyTorch

Prints the largest error of every output and gradient relative to its size, in float32, and fails above 1e-5; of products of
float16, above a part in 128. It is a process of its own because Triton reads that variable when it is imported.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels.scan import selective_blocks, selective_reference, ssd_forms, ssd_triton, ssd_triton_kernels, triton
from kernels.scan.selective_blocks import Blocks, Gradients, Passes
from kernels.scan.selective_reference import Inputs, keeps

BLOCKS = Blocks(2, 2, 4, 4, 1)
SLICED = BLOCKS._replace(slice=2)  # of four states
# L, groups, reverse, packed, bare, and the type of B and C
SELECTIVE = [
    (6, 2, True, True, False),
    (4, 1, False, False, True),
    (9, 1, False, True, False),
    (1, 1, False, False, False),
    (5, 2, False, False, False, "float16"),
    (5, 1, False, False, False, "bfloat16"),
]
# L, groups, packed, bare; head size and states, which two programs and two tiles of a program share
SSD = [(70, 2, True, False), (64, 1, False, True), (1, 1, False, False), (33, 1, False, False, 128, 128)]
STRONG = [-1e4, -1e6, -1e12, -1e30, -np.inf, -3e38, -150.0, -30.0]
"""Log-decays of one step of a sequence of mild ones: each of its own head and row."""
HALF = [{"x": 100, "B": 300, "C": 0.01, "h0": 2e5, "dy": 0.01}, {"x": 1e-3, "B": 1e-3, "dlast": 1e6}]
"""Sizes of arrays beside float16's largest number, 65,504: of states, and of their adjoints."""


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


def launch(kernel, grid, arguments) -> list[np.ndarray]:
    """Run `kernel` interpreted, on what a launcher made: arrays, shapes of outputs, constants."""
    arrays, outputs, constants = arguments
    found = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
    tensors = [Tensor(np.ascontiguousarray(x)) for x in arrays] + [Tensor(x) for x in found]
    kernel[grid](*tensors, **constants)
    return found


def grid_of(plan, inputs: Inputs) -> tuple[int, int, int]:
    B, _, G, F = inputs.u.shape
    return F // plan.blocks.channels, G, B


def forward(plan, inputs: Inputs, keep, with_states: bool):
    arguments = triton.forward_arguments(plan, inputs, keep, with_states)
    return launch(triton.kernel("forward", plan)[0], grid_of(plan, inputs), arguments)


def backward(plan, inputs: Inputs, keep, kept, dy, dlast) -> Gradients:
    arguments = triton.backward_arguments(plan, inputs, keep, kept, dy, dlast)
    d = Gradients(*map(jnp.asarray, launch(triton.kernel("backward", plan)[0], grid_of(plan, inputs), arguments)))
    given = {"z": inputs.z, "D_parts": inputs.D, "delta_bias_parts": inputs.delta_bias}
    return d._replace(**{name: None for name, x in given.items() if x is None})


def case(L: int, G: int, reverse: bool, packed: bool, bare: bool, dtype="float32", B=2, F=3, N=3):
    """Inputs, of which what varies in time is rounded to `dtype`, keep and two cotangents."""
    rng = np.random.default_rng(0)
    shapes = Inputs((B, L, G, F), (B, L, G, F), (G, N, F), (B, L, G, N), (B, L, G, N), (G, F), (B, L, G, F), (G, F), (B, G, N, F))
    inputs = Inputs(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    inputs = inputs._replace(A=-jnp.exp(inputs.A))
    inputs = inputs._replace(B=inputs.B.astype(dtype), C=inputs.C.astype(dtype))
    if bare:
        inputs = inputs._replace(D=None, z=None, delta_bias=None, delta=jnp.exp(inputs.delta))
    keep = keeps(jnp.asarray(rng.random((B, L)) < 0.3), reverse, jnp.float32) if packed else None
    cotangents = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shapes.u, shapes.h0))
    return inputs, keep, cotangents


def selective_errors(L: int, G: int, reverse: bool, packed: bool, bare: bool, dtype="float32", blocks=BLOCKS) -> dict[str, float]:
    """Relative to the largest number of each array; of float16, without its gradients, which are rounded too."""
    inputs, keep, cotangents = case(L, G, reverse, packed, bare, dtype)
    reference = jax.jit(functools.partial(selective_reference.scan, not bare, reverse))
    (y, last), pullback = jax.vjp(lambda x: reference(x, keep), inputs)
    (expected,) = pullback(cotangents)

    plan = triton.plan_of(not bare, reverse, inputs, blocks)
    run = functools.partial(selective_blocks.run, Passes(forward, backward), plan)
    (our_y, our_last), pullback = jax.vjp(lambda x: run(x, keep), inputs)
    (found,) = pullback(cotangents)
    pairs = {"y": (our_y, y), "h_last": (our_last, last)}
    pairs |= {
        name: (getattr(found, name), value)
        for name, value in expected._asdict().items()
        if value is not None and value.dtype == jnp.float32
    }
    return relative(pairs)


def relative(pairs) -> dict[str, float]:
    """Largest errors of (found, expected), by the largest number expected."""
    return {name: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for name, (a, b) in pairs.items()}


def ssd_case(L: int, G: int, packed: bool, bare: bool, P=16, N=16, B=2, R=2):
    """x, dt, log-decays, B, C, D and h0, and two cotangents."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocked = jnp.asarray(rng.random((B, L, 1, 1)) < 0.1) & packed
    x, D, h0 = normal(B, L, G, R, P), normal(G, R), normal(B, G, R, P, N)
    dt, log_decay = jnp.abs(normal(B, L, G, R)), jnp.where(blocked, ssd_forms.NOTHING, -jnp.abs(normal(B, L, G, R)))
    operands = [x, dt, None if bare else log_decay, normal(B, L, G, N), normal(B, L, G, N), None if bare else D, h0]
    return operands, (normal(*x.shape), normal(*h0.shape))


def ssd_compared(operands, cotangents) -> dict[str, float]:
    """The same of the matrix form, inference first, against float64."""

    def through(run, operands, cotangents):
        results, pullback = jax.vjp(run, *operands)
        cotangents = [g.astype(y.dtype) for g, y in zip(cotangents, results)]
        return *results, *(gradient for gradient in pullback(tuple(cotangents)) if gradient is not None)

    names = ["y", "h_last", *(name for name, x in zip(("x", "dt", "l", "B", "C", "D", "h0"), operands) if x is not None)]
    found = through(ssd_triton.scan, operands, cotangents)
    pairs = dict(zip(names, found)) | {"inference": ssd_triton.scan(*operands)[0]}
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float64)), (operands, cotangents))
        expected = dict(zip(names, through(ssd_forms.on_steps(ssd_forms.recurrence), *exact)))
        expected["inference"] = expected["y"]
        return relative({name: (jnp.asarray(np.asarray(v, np.float64)), expected[name]) for name, v in pairs.items()})


def ssd_errors(*arguments) -> dict[str, float]:
    """The products are float32 here."""
    return ssd_compared(*ssd_case(*arguments))


def strong_errors(*arguments) -> dict[str, float]:
    """One step in each head's first chunk, among decays that are mild, leaves next to nothing."""
    (x, dt, log_decay, *rest), cotangents = ssd_case(*arguments)
    log_decay = (0.1 * log_decay).at[:, 9].set(np.float32(STRONG).reshape(log_decay[:, 0].shape))
    return ssd_compared([x, dt, log_decay, *rest], cotangents)


def half_errors(sizes: dict[str, float]) -> dict[str, float]:
    """Of x, B and C in float16."""
    (x, dt, log_decay, B, C, D, h0), (dy, dlast) = ssd_case(40, 1, False, False)
    x, B, C = ((v * sizes.get(name, 1)).astype(jnp.float16) for name, v in (("x", x), ("B", B), ("C", C)))
    h0, dy, dlast = (v * sizes.get(name, 1) for name, v in (("h0", h0), ("dy", dy), ("dlast", dlast)))
    return ssd_compared([x, dt, 0.1 * log_decay, B, C, D, h0], (dy, dlast))


def ssd_launch(name: str, operands, **options) -> list[np.ndarray]:
    """`ssd_triton._launch`, interpreted."""
    arrays, outputs, constants, _ = ssd_triton.ARGUMENTS[name](*operands, **options)
    kernel = getattr(ssd_triton_kernels, name)
    return [jnp.asarray(x) for x in launch(kernel, ssd_triton.grid_of(constants, len(arrays[0])), (arrays, outputs, constants))]


ssd_triton._launch = ssd_launch


def cases():
    """Arguments, what finds the errors, and the largest allowed."""
    yield from ((x, selective_errors, 1e-5) for x in SELECTIVE)
    yield from ((x, functools.partial(selective_errors, blocks=SLICED), 1e-5) for x in (SELECTIVE[0], SELECTIVE[-1]))
    yield from ((x, ssd_errors, 1e-5) for x in SSD)
    yield (40, 2, False, False), strong_errors, 1e-5
    yield from ((x, half_errors, 2**-7) for x in HALF)


def main() -> None:
    worst = 0.0
    for arguments, errors, allowed in cases():
        found = errors(*arguments) if isinstance(arguments, tuple) else errors(arguments)
        print(arguments, "  ".join(f"{name} {error:.1e}" for name, error in found.items()), flush=True)
        worst = max([worst, *(error / allowed if np.isfinite(error) else np.inf for error in found.values())])
    sys.exit(0 if worst < 1 else f"an error of {worst:.2g} times what is allowed")


if __name__ == "__main__":
    main()
