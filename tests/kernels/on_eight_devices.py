"""Attention and scans on a mesh of eight CPU devices against one device: prints JSON, {case: {array: errors}}.

Run as a program: the number of devices is fixed when JAX starts.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from kernels.attention import Dropout, attend, biases, explain, masks, ring
from kernels.scan import linear_scan, selective_scan, ssd

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)


def mesh(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)


L = 128
OPERANDS = dict(q=normal(2, L, 4, 8), k=normal(2, L, 2, 8), v=normal(2, L, 2, 8))
DOCUMENTS = np.sort(rng.integers(0, 4, (2, L)), axis=1).astype(np.int32)
TABLE = normal(4, 32)


def attention(mask, **options):
    def run(arrays):
        table = arrays.get("table")
        bias = None if table is None else biases.Bucketed(table, biases.T5Buckets(bidirectional=False))
        return attend(arrays["q"], arrays["k"], arrays["v"], mask=mask, bias=bias, return_lse=True, **options)

    return run


ATTENTION = {
    "causal": (dict(seq=8), attention(masks.Causal()), OPERANDS),
    "window": (dict(data=2, seq=4), attention(masks.Causal() & masks.Window(9)), OPERANDS),
    "full, both directions": (dict(seq=4, model=2), attention(masks.Full()), OPERANDS),
    "documents": (dict(data=2, seq=4), attention(masks.Causal(), segment_ids=DOCUMENTS), OPERANDS),
    "learned bias, dropout": (
        dict(data=2, seq=2, model=2),
        attention(masks.Causal(), dropout=Dropout(0.3, jax.random.key(0))),
        {**OPERANDS, "table": TABLE},
    ),
    "rows and heads alone": (
        dict(data=2, model=2, expert=2),
        attention(masks.Causal() & masks.Window(40), dropout=Dropout(0.3, jax.random.key(0))),
        {**OPERANDS, "table": TABLE},
    ),
}

RESET = np.zeros((2, L), bool)
RESET[:, [0, 16, 50, 96, 111]] = True  # two of them at the borders of stretches of 16
DECAY = (0.9 + 0.1 * rng.uniform(size=(2, L, 6))).astype(np.float32)
ROTATION = (0.99 * np.exp(1j * rng.uniform(size=6))).astype(np.complex64)
S6 = dict(
    u=normal(2, L, 8), delta=normal(2, L, 8), A=-np.exp(normal(8, 4)), B=normal(2, L, 4), C=normal(2, L, 4), D=normal(8),
    z=normal(2, L, 8), delta_bias=normal(8),
)  # fmt: skip
SSD = dict(
    x=normal(2, L, 4, 3), dt=normal(2, L, 4), A=-np.exp(normal(4)), B=normal(2, L, 2, 5), C=normal(2, L, 2, 5), D=normal(4)
)


def scanned(op, **options):
    return lambda arrays: op(**arrays, **options)


def real_and_imaginary(h):
    return jnp.concatenate([h.real, h.imag], axis=-1)


SCANS = {
    "linear": (dict(data=2, seq=4), scanned(linear_scan, reset=RESET), dict(a=DECAY, b=normal(2, L, 6))),
    "linear, reverse": (dict(seq=8), scanned(linear_scan, reset=RESET, reverse=True), dict(a=DECAY, b=normal(2, L, 6))),
    "linear, time-invariant": (
        dict(seq=4, model=2),
        lambda x: jax.tree.map(real_and_imaginary, linear_scan(x["a"], x["b"], h0=x["h0"])),
        dict(a=ROTATION, b=normal(2, L, 6), h0=normal(2, 6)),
    ),
    "selective": (dict(data=2, seq=2, model=2), scanned(selective_scan, reset=RESET), S6),
    "selective, reverse": (dict(seq=4, data=2), scanned(selective_scan, reset=RESET, reverse=True), S6),
    "ssd": (dict(seq=4, model=2), scanned(ssd, reset=RESET), SSD),
}


def results(run, arrays):
    """Outputs, and the gradients of every array of a fixed linear function of them."""

    def loss(arrays):
        outputs = run(arrays)
        weights = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), outputs)
        terms = jax.tree.map(lambda w, y: jnp.sum(w * jnp.where(jnp.isfinite(y), y, 0)), weights, outputs)
        return sum(jax.tree.leaves(terms)), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    named = {f"out{i}": y for i, y in enumerate(jax.tree.leaves(outputs))}
    return jax.device_get({**named, **{f"d{name}": g for name, g in gradients.items()}})


def error(found, exact):
    """The largest error, relative to the largest entry where that is above 1: a sum over every position may be thousands."""
    finite = np.isfinite(exact)
    assert (np.isfinite(found) == finite).all()
    return float(np.max(np.abs(found - exact)[finite], initial=0) / np.max(np.abs(exact)[finite], initial=1))


def compare(sizes, run, arrays):
    """Largest error of each array on the mesh, and of the same in float32 on one device, against float64 on one device."""
    wide = jax.tree.map(lambda x: x.astype(np.complex128 if np.iscomplexobj(x) else np.float64), arrays)
    exact, plain = results(run, wide), results(run, arrays)
    with jax.set_mesh(mesh(**sizes)):
        spread = results(run, arrays)
    return {name: [error(spread[name], exact[name]), error(plain[name], exact[name])] for name in exact}


def told():
    """What `explain` says under a mesh, and what a length that the devices do not divide gives."""
    q = jax.ShapeDtypeStruct((1, 128, 2, 8), jnp.float32)
    odd = jax.ShapeDtypeStruct((1, 126, 2, 8), jnp.float32)
    with jax.set_mesh(mesh(seq=8)):
        try:
            explain(odd, odd, odd, implementation="ring")
            refusal = ""
        except ValueError as refused:
            refusal = str(refused)
        return {"divided": str(explain(q, q, q, mask=masks.Causal())), "odd": str(explain(odd, odd, odd)), "by name": refusal}


def layouts():
    """(dealt out, steps) of some masks for 1,024 tokens on 8 devices."""
    cases = {"causal": masks.Causal(), "window": masks.Causal() & masks.Window(100), "full": masks.Full()}
    return {name: ring.layout(mask, 1024, 8) for name, mask in cases.items()}


if __name__ == "__main__":
    cases = {**ATTENTION, **SCANS}
    print(json.dumps({"told": told(), "layouts": layouts(), "cases": {name: compare(*cases[name]) for name in sys.argv[1:]}}))
