"""Whether implementations of scans are right on the device that is here: a table of calls, their errors, whether runs repeat.

The truth is the reference in float64 on the same, already rounded, inputs. Outputs may be twice, gradients three times as far
from it as the reference in the arguments' own types (FlashAttention's criterion, as `kernels.attention.numerics`), and a part in
100,000 of the array's largest number besides: float32 sums in another order, and a GPU's exponentials. Those of `ssd`,
whose products have operands of 16 bits, may be off by a part in 128, gradients by two.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.scan import api, linear_scan, selective, selective_scan, ssd
from kernels.scan.ssd import IMPLEMENTATIONS as SSD

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `states`, `groups` and `head_dim` count where the op has them.

    bare: without D, z and delta_bias. decay: the rate of the fastest states.
    """

    op: str
    L: int
    dtype: str = "bfloat16"
    channels: int = 96
    states: int = 16
    head_dim: int = 64
    groups: int = 1
    reset: bool = False
    reverse: bool = False
    bare: bool = False
    decay: float = 1.0
    B: int = 2

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in given.items())

    def arrays(self) -> Arrays:
        """The differentiable arguments, the same each time: in time of type `dtype`, parameters and the state float32."""
        rng = np.random.default_rng(self.L)
        return {
            name: jnp.asarray(value(rng).astype(np.float32)).astype(self.dtype if in_time else jnp.float32)
            for name, (value, in_time) in OPS[self.op].arguments(self).items()
        }

    def options(self) -> dict[str, Any]:
        """The arguments that no gradient reaches."""
        starts = np.random.default_rng(1).random((self.B, self.L)) < 0.05
        return {"reset": jnp.asarray(starts) if self.reset else None, "reverse": self.reverse}


def _normal(*shape: int) -> Callable:
    return lambda rng: rng.normal(size=shape)


def _rates(case: Case, *shape: int) -> Callable:
    """Not positive, over three orders of magnitude."""
    return lambda rng: -case.decay * 10.0 ** -rng.uniform(0, 3, size=shape)


def _selective(case: Case) -> dict[str, tuple[Callable, bool]]:
    in_time, by_group = (case.B, case.L, case.channels), (case.B, case.L, case.groups, case.states)
    arguments = {name: (_normal(*in_time), True) for name in ("u", "delta")}
    arguments |= {name: (_normal(*by_group), True) for name in ("B", "C")}
    arguments["A"] = _rates(case, case.channels, case.states), False
    arguments["h0"] = _normal(case.B, case.channels, case.states), False
    if not case.bare:
        arguments |= {name: (_normal(case.channels), False) for name in ("D", "delta_bias")}
        arguments["z"] = _normal(*in_time), True
    return arguments


def _ssd(case: Case) -> dict[str, tuple[Callable, bool]]:
    """B and C scaled so that their products are of size 1."""
    heads, by_group = case.channels // case.head_dim, (case.B, case.L, case.groups, case.states)
    arguments = {"x": (_normal(case.B, case.L, heads, case.head_dim), True), "dt": (_normal(case.B, case.L, heads), True)}
    arguments |= {name: (lambda rng: rng.normal(size=by_group) * case.states**-0.25, True) for name in ("B", "C")}
    arguments["A"] = _rates(case, heads), False
    arguments["h0"] = _normal(case.B, heads, case.head_dim, case.states), False
    return arguments if case.bare else arguments | {name: (_normal(heads), False) for name in ("D", "dt_bias")}


def _linear(case: Case) -> dict[str, tuple[Callable, bool]]:
    shape = case.B, case.L, case.channels
    a = lambda rng: np.exp(_rates(case, *shape)(rng))  # noqa: E731
    return {"a": (a, True), "b": (_normal(*shape), True), "h0": (_normal(case.B, case.channels), False)}


class Op(NamedTuple):
    """An op: its arguments as (how they are drawn, whether they vary in time), the function, its implementations.

    rounding: by products of rounded operands, of outputs, relative to the largest number; of gradients twice that.
    """

    arguments: Callable[[Case], dict[str, tuple[Callable, bool]]]
    run: Callable[..., Any]
    implementations: dict[str, Any]
    rounding: float = 0.0


OPS = {
    "selective_scan": Op(_selective, selective_scan, selective.IMPLEMENTATIONS),
    "ssd": Op(_ssd, ssd, SSD, 2**-7),
    "linear_scan": Op(_linear, linear_scan, api.IMPLEMENTATIONS),
}


def table() -> Iterator[Case]:
    """What is run on a card: lengths around chunks' ends, each with other features; whole and broken blocks of channels."""
    yield Case("selective_scan", 1000, channels=256)
    yield Case("selective_scan", 1)
    yield Case("selective_scan", 2, "float32", bare=True)
    yield Case("selective_scan", 63, groups=2, reset=True, reverse=True)
    yield Case("selective_scan", 65, "float32", reset=True, decay=100.0)
    yield Case("selective_scan", 1000, "float32", groups=2, states=5, decay=0.01)
    yield Case("selective_scan", 1000, states=32, channels=40, reverse=True)
    yield Case("selective_scan", 65, states=50, groups=2, reset=True, reverse=True)
    yield Case("ssd", 1000, channels=256, states=128)
    yield Case("ssd", 1, channels=64)
    yield Case("ssd", 2, "float16", channels=128, states=32, head_dim=32, bare=True)
    yield Case("ssd", 63, channels=128, head_dim=16, groups=2, reset=True, reverse=True)
    yield Case("ssd", 65, channels=128, head_dim=128, states=64, reset=True, decay=100.0)
    yield Case("linear_scan", 1000, "float32", channels=256)
    yield from (Case("linear_scan", L, "float32", reset=True, reverse=L == 65) for L in (1, 2, 63, 65))


def check(name: str, case: Case, runs: int = 2) -> dict[str, Any]:
    """For each result its error and the one allowed; `repeats`: all runs gave the same bits; `passed`: all is well."""
    arrays, options = case.arrays(), case.options()
    step = _step(case, name, options)
    ours, *more = (jax.tree.map(np.asarray, step(arrays)) for _ in range(runs))
    theirs = _step(case, "reference", options)(arrays)
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        truth = jax.tree.map(np.asarray, _step(case, "reference", options)(exact))
    results = {key: _compare(case, key, ours[key], theirs[key], truth[key]) for key in truth}
    repeats = all(np.array_equal(ours[key], again[key]) for again in more for key in truth)
    return {"case": str(case), "repeats": repeats, "passed": repeats and all(x["passed"] for x in results.values()), **results}


def _step(case: Case, name: str, options: dict[str, Any]) -> Callable[[Arrays], Arrays]:
    """A compiled function from the arguments to both results and, for one draw of cotangents, all gradients."""

    def run(arrays):
        return OPS[case.op].run(**arrays, **options, implementation=name)

    def step(arrays):
        results, pullback = jax.vjp(run, arrays)
        rng = np.random.default_rng(2)
        gradients = pullback(tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in results))[0]
        return dict(zip(("y", "h_last"), results)) | {f"d{key}": x for key, x in gradients.items()}

    return jax.jit(step)


def _compare(case: Case, key: str, ours, theirs, truth) -> dict[str, Any]:
    error, reference = (float(np.abs(np.asarray(x, np.float64) - truth).max()) for x in (ours, theirs))
    factor, rounding = (3, 2 * OPS[case.op].rounding) if key.startswith("d") else (2, OPS[case.op].rounding)
    allowed = factor * reference + (rounding + 1e-5) * float(np.abs(truth).max())
    return {"error": error, "allowed": allowed, "passed": error <= allowed}
