"""Floating-point operations of a function, counted in its jaxpr: a formula, the same on every backend and for every compiler.

Counted are matrix products (2 m n k), convolutions (2 for each multiply-add) and Fourier transforms (5 N log2 N, FFTW's
convention), four times as many where numbers are complex; loops as often as they turn. Elementwise work is not. XLA's own
`cost_analysis()` counts the body of every loop once, which makes a scan over chunks look free.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core


class Flops(NamedTuple):
    """loops: how many loops turn as often as their data say and were counted once; with any, `count` is a bound from below."""

    count: int | float
    loops: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.count + other.count, self.loops + other.loops)

    def times(self, n: int | float) -> "Flops":
        return Flops(n * self.count, self.loops)


def of(fn: Callable, *args: Any) -> Flops:
    """Operations of `fn(*args)`; the arguments may be `jax.ShapeDtypeStruct`s. Nothing is compiled."""
    return of_jaxpr(jax.make_jaxpr(fn)(*args).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> Flops:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), Flops(0))


def _of_equation(equation: core.JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name in COUNTED:
        return Flops(COUNTED[name](equation))
    inner = [of_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    total = sum(inner, Flops(0))
    if name == "scan":
        return total.times(params["length"])
    if name == "while":
        return Flops(total.count, total.loops + (total.count > 0))
    if name == "pallas_call":
        return total.times(math.prod(params["grid_mapping"].grid))
    return total


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, calls."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # a ClosedJaxpr has one
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def _products(equation: core.JaxprEqn, terms: int | float) -> int | float:
    """Every output is a sum of so many products; a complex product and sum are 8 operations."""
    out = equation.outvars[0].aval
    return (8 if jnp.iscomplexobj(out) else 2) * math.prod(out.shape) * terms


def _dot(equation: core.JaxprEqn) -> int | float:
    (contracting, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return _products(equation, math.prod(lhs[i] for i in contracting))


def _convolution(equation: core.JaxprEqn) -> int | float:
    """The terms of an output are the kernel's positions times the input channels of its group."""
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    return _products(equation, math.prod(kernel) / kernel[numbers.rhs_spec[0]])


def _fft(equation: core.JaxprEqn) -> int | float:
    """Of a complex transform, and half of it where one side is real."""
    (given, made), lengths = (equation.invars[0].aval, equation.outvars[0].aval), equation.params["fft_lengths"]
    rows = math.prod(given.shape) / math.prod(given.shape[-len(lengths) :])
    points = math.prod(lengths)
    is_real = not (jnp.iscomplexobj(given) and jnp.iscomplexobj(made))
    return 5 * rows * points * math.log2(max(points, 2)) / (2 if is_real else 1)


COUNTED: dict[str, Callable[[core.JaxprEqn], int | float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "fft": _fft,
}
