"""The scans on random shapes, types and options, right and wrong, against a loop over time in float64."""

import math
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.dispatch import shown
from kernels.scan import linear_scan, selective_scan, ssd
from tests.fuzz.judge import Case, WrongResult

CLEAR = re.compile(r"^(linear_scan|selective_scan|ssd): ")
SECONDS = 60.0
SHAPES = ((1, 1), (2, 3), (1, 17), (2, 66))
"""Batch and length. Few, so that most cases find their program compiled."""
ODD = (
    None, 3, 2.5, "a", [1.0, 2.0], (), np.zeros((2, 2)), np.float32(1.0), np.zeros((0,)), np.zeros((1, 0, 2), np.float32),
    np.ones((2, 3, 4, 5, 6), np.float32),
)  # fmt: skip
LIMITS = ((0.0, math.inf), (0.1, 0.5))
BAD_LIMITS = ((0.5, 0.1), 3, (1,), ("a", "b"), (math.nan, 1.0))
WRONG_TYPES = ("int32", "bool", "uint8", "complex64", "str", "object")


def numbers(rng: random.Random, shape, dtype="float32") -> np.ndarray:
    return np.random.default_rng(rng.getrandbits(32)).standard_normal(shape).astype(dtype)


def damage(rng: random.Random, arguments: dict[str, Any]) -> str:
    """Replace, reshape, retype or drop one argument; says how."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, np.ndarray | jax.Array) and value.ndim and rng.random() < 0.75:
        kind = rng.choice(("longer", "shorter", "extra axis", "fewer axes", "type", "swapped"))
        value, axis = np.asarray(value), rng.randrange(value.ndim)
        if kind == "longer":
            arguments[name] = np.concatenate([value, value], axis)
        elif kind == "shorter":
            arguments[name] = np.asarray(value).take(np.arange(value.shape[axis] - 1), axis)
        elif kind == "extra axis":
            arguments[name] = value[None]
        elif kind == "fewer axes":
            arguments[name] = value[0] if len(value) else np.zeros(value.shape[1:], value.dtype)
        elif kind == "swapped":
            arguments[name] = np.swapaxes(value, 0, -1)
        else:
            numeric = value.astype(np.float32) if value.dtype == jnp.bfloat16 else value
            arguments[name] = numeric.astype(rng.choice(WRONG_TYPES))
        new = arguments[name]
        return f"{name} {kind}: {new.dtype} {new.shape}"
    odd = rng.choice(ODD)
    arguments[name] = odd
    return f"{name}={shown(odd)}"


def compare(name: str, got: Any, expected: np.ndarray, tolerance: float) -> None:
    got = np.asarray(got, expected.dtype)
    if got.shape != expected.shape:
        raise WrongResult(f"{name}: shape {got.shape}, expected {expected.shape}")
    both_nan = np.isnan(got) & np.isnan(expected)
    error = np.max(np.abs(np.where(both_nan, 0, got - expected)), initial=0.0)
    if not error <= tolerance * (1 + np.max(np.abs(expected), initial=0.0)):
        raise WrongResult(f"{name}: differs by {error:.3g}")


def walk(decay, inputs, h0, reset, reverse: bool) -> np.ndarray:
    """h_t = decay_t h_{t-1} + inputs_t, decay and inputs [B, L, ...], in their own precision."""
    length = inputs.shape[1]
    out, h = np.zeros_like(inputs), h0
    for t in reversed(range(length)) if reverse else range(length):
        starts = t if not reverse else t + 1  # the document start that stands between t and the step before
        cut = np.ones(len(h)) if reset is None or starts >= length else 1.0 - reset[:, starts]
        h = decay[:, t] * np.where(cut.reshape(-1, *[1] * (h.ndim - 1)) > 0, h, 0) + inputs[:, t]
        out[:, t] = h
    return out


def options_of(rng: random.Random, batch: int, length: int, names: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {"reverse": rng.random() < 0.3}
    if rng.random() < 0.4:
        options["reset"] = np.random.default_rng(rng.getrandbits(32)).random((batch, length)) < 0.2
    if rng.random() < 0.5:
        options["implementation"] = rng.choice([*names, "no such", "portable"] if rng.random() < 0.2 else names)
    return options


def linear(rng: random.Random):
    batch, length = rng.choice(SHAPES)
    state = rng.choice(((), (3,), (2, 2)))
    dtype = rng.choice(("float32", "float32", "bfloat16", "float16", "complex64"))
    shape = (batch, length, *state)
    a = 0.9 * np.tanh(np.asarray(numbers(rng, shape if rng.random() < 0.5 else state)))
    arguments = {"a": jnp.asarray(a, dtype), "b": jnp.asarray(numbers(rng, shape), dtype)}
    options = options_of(rng, batch, length, ("chunked", "reference", "associative"))
    if rng.random() < 0.4:
        options["h0"] = jnp.asarray(numbers(rng, (batch, *state)), dtype)

    def expected(a, b, h0=None, reset=None, reverse=False, implementation=None):
        wide = np.complex128 if any(np.iscomplexobj(np.asarray(v)) for v in (a, b, h0) if v is not None) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        h0 = np.zeros(b[:, 0].shape, wide) if h0 is None else np.asarray(h0).astype(wide)
        h = walk(np.broadcast_to(a, b.shape), b, h0, reset, reverse)
        return h, h[:, 0 if reverse else -1]

    return linear_scan, arguments, options, expected, 1e-4


def selective(rng: random.Random):
    batch, length = rng.choice(SHAPES)
    channels, states = 4, 2
    dtype = rng.choice(("float32", "bfloat16"))
    groups = rng.choice((None, 1, 2))
    bc = (batch, length, states) if groups is None else (batch, length, groups, states)
    arguments = {
        "u": numbers(rng, (batch, length, channels)), "delta": numbers(rng, (batch, length, channels)),
        "A": -np.exp(numbers(rng, (channels, states))), "B": numbers(rng, bc), "C": numbers(rng, bc),
    }  # fmt: skip
    optional = {"D": (channels,), "z": (batch, length, channels), "delta_bias": (channels,)}
    arguments |= {name: numbers(rng, shape) for name, shape in optional.items() if rng.random() < 0.5}
    arguments = {name: jnp.asarray(x, "float32" if name in "AD" else dtype) for name, x in arguments.items()}
    options = options_of(rng, batch, length, ("chunked", "reference", "associative"))
    if rng.random() < 0.4:
        options["h0"] = numbers(rng, (batch, channels, states))

    def expected(u, delta, A, B, C, D=None, z=None, delta_bias=None, h0=None, reset=None, reverse=False, implementation=None):
        wide = [None if x is None else np.asarray(x).astype(np.float64) for x in (u, delta, A, B, C, D, z, delta_bias, h0)]
        u, delta, A, B, C, D, z, delta_bias, h0 = wide
        B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
        B, C = (np.repeat(x, channels // x.shape[2], axis=2) for x in (B, C))
        dt = np.log1p(np.exp(delta + (0 if delta_bias is None else delta_bias)))
        h0 = np.zeros((len(u), *A.shape)) if h0 is None else h0
        h = walk(np.exp(dt[..., None] * A), (dt * u)[..., None] * B, h0, reset, reverse)
        y = (h * C).sum(-1) + (0 if D is None else D * u)
        return y if z is None else y * z / (1 + np.exp(-z)), h[:, 0 if reverse else -1]

    return selective_scan, arguments, options, expected, 1e-4 if dtype == "float32" else 3e-2


def dual(rng: random.Random):
    batch, length = rng.choice(SHAPES)
    heads, size, states = 4, 3, 2
    groups = rng.choice((1, 2, 4))
    arguments = {
        "x": numbers(rng, (batch, length, heads, size)), "dt": numbers(rng, (batch, length, heads)),
        "A": -np.exp(numbers(rng, (heads,))), "B": numbers(rng, (batch, length, groups, states)),
        "C": numbers(rng, (batch, length, groups, states)),
    }  # fmt: skip
    arguments |= {name: numbers(rng, (heads,)) for name in ("D", "dt_bias") if rng.random() < 0.5}
    options = options_of(rng, batch, length, ("chunked", "reference"))
    if rng.random() < 0.4:
        options["h0"] = numbers(rng, (batch, heads, size, states))
    if rng.random() < 0.2:
        options["dt_limit"] = rng.choice((*LIMITS, *BAD_LIMITS))

    def expected(
        x, dt, A, B, C, D=None, dt_bias=None, h0=None, reset=None, reverse=False, implementation=None, dt_limit=(0, math.inf)
    ):
        x, dt, B, C = (np.asarray(v).astype(np.float64) for v in (x, dt, B, C))
        A = np.zeros(heads) if A is None else np.asarray(A).astype(np.float64)
        dt = np.clip(np.log1p(np.exp(dt + (0 if dt_bias is None else np.asarray(dt_bias)))), *dt_limit)
        B, C = (np.repeat(v, heads // v.shape[2], axis=2)[:, :, :, None] for v in (B, C))
        h0 = np.zeros((len(x), heads, x.shape[3], B.shape[-1])) if h0 is None else np.asarray(h0).astype(np.float64)
        h = walk(np.exp(dt * A)[..., None, None], (dt[..., None] * x)[..., None] * B, h0, reset, reverse)
        y = (h * C).sum(-1) + (0 if D is None else np.asarray(D)[:, None] * x)
        return y, h[:, 0 if reverse else -1]

    return ssd, arguments, options, expected, 1e-4


def expectation(options: dict[str, Any]) -> str | None:
    """Of arguments as documented with these options."""
    if options.get("implementation") == "no such" or options.get("dt_limit") in BAD_LIMITS:
        return "refused"
    return None if options.get("implementation") == "portable" else "right"


def case(rng: random.Random) -> Case:
    op, arguments, options, expected, tolerance = rng.choice((linear, selective, dual))(rng)
    given = {**arguments, **options}
    how, expects = "as documented", expectation(options)
    if rng.random() < 0.7:
        how = "; ".join(damage(rng, given) for _ in range(rng.choice((1, 1, 2))))
        expects = None
    shapes = {k: (str(v.dtype), v.shape) if isinstance(v, np.ndarray | jax.Array) else v for k, v in given.items()}

    def check() -> str:
        got = op(**given)
        for name, x, y in zip(("output", "last state"), got, expected(**given), strict=True):
            wide = np.asarray(x, np.complex128 if np.iscomplexobj(np.asarray(x)) else np.float64)
            loose = any(getattr(v, "dtype", None) in (jnp.bfloat16, np.float16) for v in given.values())
            compare(name, wide, np.asarray(y), max(tolerance, 2e-2 if loose else 0))
        return "right"

    return Case(f"{op.__name__} {how} {shapes}"[:500], check, expects)
