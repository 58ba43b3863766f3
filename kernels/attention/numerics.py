"""FlashAttention's criterion for kernels in 16 bits: on a table of calls, the error against float32, and whether runs repeat.

The output's error is at most twice, the gradients' at most three times that of dense attention in the same 16-bit type (Dao's
tests of FlashAttention, https://github.com/Dao-AILab/flash-attention), and two runs give the same bits.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import biases, masks, reference
from kernels.attention.call import Call, Spans, transform_scores
from kernels.attention.mosaic.decode import limits

OPERANDS = ("q", "k", "v", "bias")

Run = Callable[[Call], tuple[jax.Array, jax.Array]]

ALLOWED = {"out": 2, "lse": 2, "dq": 3, "dk": 3, "dv": 3, "dbias": 3}
"""How many times the dense form's error each result may have; `dbias` is of all the bias's arrays."""


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(2), shape)


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.Causal() & masks.Window(100),
    "nothing for some": masks.Causal() & masks.Band(2**30, -40),
    "BigBird": masks.random_blocks(64, 16, 2, seed=0) | masks.Window(64) | masks.Global((0, 1)),
    "by head": masks.PerHead((masks.Causal(), masks.Window(70))),
    "negated": masks.Causal() & ~masks.Strided(3),
}

BIASES = {
    "ALiBi": lambda H, L, S: biases.ALiBi(jnp.asarray(biases.alibi_slopes(H))),
    "dense": lambda H, L, S: biases.Dense(_normal(1, H, L, S)),
    "dense, of keys": lambda H, L, S: biases.Dense(jnp.where(jnp.arange(S) % 5 == 3, -jnp.inf, _normal(1, 1, 1, S))),
    "T5": lambda H, L, S: biases.Bucketed(_normal(H, 32)),
    "KERPLE": lambda H, L, S: biases.KerpleLog(*(1 + jnp.arange(2 * H, dtype=jnp.float32) / H).reshape(2, H)),
}
"""By name, of a number of heads and the lengths."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `mask` and `bias` are keys of `MASKS` and `BIASES`, `documents` how many are packed, 0 for no segment ids.

    positions: queries and keys are dealt out, as in a ring of two devices: the odd positions of twice as many. ragged: the last
    query stands elsewhere in each row of the batch, from before the first key to the last key.
    """

    L: int
    S: int
    D: int
    mask: str
    dtype: str = "bfloat16"
    B: int = 1
    H: int = 2
    G: int = 2
    softcap: float | None = None
    documents: int = 0
    bias: str | None = None
    positions: bool = False
    ragged: bool = False

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in given.items())

    def call(self) -> Call:
        """Normal numbers, the same each time."""
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (self.B, self.L, self.H, self.D), *[(self.B, self.S, self.G, self.D)] * 2
        q, k, v = (jax.random.normal(key, shape, jnp.dtype(self.dtype)) for key, shape in zip(keys, shapes))
        ids = [self._ids(self.L), self._ids(self.S)] if self.documents else [None, None]
        bias = None if self.bias is None else BIASES[self.bias](self.H, self.L, self.S)
        positions = [1 + 2 * jnp.arange(n)[None] for n in (self.L, self.S)] if self.positions else [None, None]
        if self.ragged:
            row, rows = jnp.arange(self.B)[:, None], max(1, self.B - 1)
            last = row * self.S // rows - row % rows - 1  # so that no length is a whole number of blocks
            positions = [last + jnp.arange(1 - self.L, 1)[None], None]
        spans = Spans(jnp.int32(1), (((0, 2), (0, 2)), ((1, 2), (1, 2)))) if self.positions else None
        arrays = q, k, v, bias, *ids, *positions, None, spans
        return Call(*arrays, mask=MASKS[self.mask], softcap=self.softcap, scale=self.D**-0.5)

    def _ids(self, length: int) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(length) * self.documents // length, (self.B, length))

    def cotangents(self) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(jax.random.key(1), 2)
        of_lse = jax.random.normal(keys[1], (self.B, self.L, self.H))
        return jax.random.normal(keys[0], (self.B, self.L, self.H, self.D), jnp.dtype(self.dtype)), of_lse


def table() -> Iterator[Case]:
    """What is run on a card: first each feature (grouped heads, both types, soft-cap, documents, positions, biases), then every
    mask at lengths around tiles' ends."""
    for D, mask in itertools.product((64, 128, 256), ("full", "causal")):
        yield Case(1000, 1000, D, mask, B=2, H=8, G=2)
        yield Case(1000, 1000, D, mask, dtype="float16")
        yield Case(1000, 1000, D, mask, documents=3)
        yield Case(500, 500, D, mask, positions=True)
        yield Case(4096, 4096, D, mask, B=2, H=4)
        yield Case(500, 500, D, mask, H=4, G=1, softcap=15.0)
        yield from (Case(500, 430, D, mask, B=2, H=4, G=2, bias=bias) for bias in BIASES)
    for D, mask in itertools.product((64, 128, 256), ("BigBird", "negated")):
        yield Case(1000, 1000, D, mask, H=4, G=2 if mask == "BigBird" else 4)
    yield from (Case(1000, 1000, D, "by head", B=2) for D in (64, 128, 256))
    yield from (Case(L, S, 256, mask) for mask in MASKS for L, S in ((65, 65), (257, 1000)))
    lengths = (1, 1), (63, 63), (65, 65), (113, 203), (799, 3), (128, 128), (257, 257), (1024, 1023), (2048, 2048)
    for D, mask, (L, S) in itertools.product((64, 128), MASKS, lengths):
        yield Case(L, S, D, mask)


def decode_table() -> Iterator[Case]:
    """What is run on a card of kernels for few queries: every number of rows and of splits, ragged rows, types, soft-cap."""
    for D in (64, 128, 256):
        yield from (Case(1, S, D, "causal", B=5, H=8, G=2, ragged=True) for S in (64, 8192))
        yield Case(1, 4096, D, "full", B=2, H=4, G=4)
        yield Case(1, 4096, D, "causal", B=3, H=64, G=1, ragged=True)
        yield Case(1, 2048, D, "causal", B=40, H=16, G=8, ragged=True)
        yield Case(1, 1024, D, "causal", dtype="float16", B=3, H=6, G=2, ragged=True)
        yield Case(1, 1024, D, "causal", softcap=15.0, B=3, H=4, G=1, ragged=True)
    yield Case(1, 65536, 128, "causal", B=1, H=8, G=1)


def chunk_table() -> Iterator[Case]:
    """Those with several queries of each sequence."""
    for D in (64, 128, 256):
        yield from (Case(L, S, D, "causal", B=3, H=8, G=2, ragged=True) for L, S in ((5, 1024), (16, 2048)))
        yield Case(2, 64, D, "full", H=4, G=1)


def in_blocks(run: Callable[..., tuple[jax.Array, jax.Array]], block_size: int) -> Run:
    """A function of `paged.attend`'s arrays as one of calls with one query: NaNs in blocks beyond a row's length."""

    def of_call(call: Call) -> tuple[jax.Array, jax.Array]:
        (B, S, G, D), seen = call.k.shape, limits(call)
        shape = B, S // block_size, block_size, G, D
        tables = jax.random.permutation(jax.random.key(3), shape[0] * shape[1])
        is_key = (jnp.arange(S)[None] < seen)[..., None, None]

        def pool(x):
            blocks = jnp.where(is_key, x, jnp.nan).reshape(shape[0] * shape[1], block_size, G, D)
            return jnp.moveaxis(jnp.zeros_like(blocks).at[tables].set(blocks), 2, 0)

        options = {"softcap": call.softcap, "scale": call.scale}
        out, lse = run(call.q[:, 0], pool(call.k), pool(call.v), tables.reshape(shape[:2]), seen[:, 0], **options)
        return out[:, None], lse[:, None]

    return of_call


def dense(call: Call) -> tuple[jax.Array, jax.Array]:
    """Attention with every score in memory, products and weights rounded to the type of the arguments."""
    groups = call.q.shape[2] // call.k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (call.k, call.v))
    score = call.scale * jnp.einsum("blhd,bshd->bhls", call.q, k).astype(jnp.float32)
    score = transform_scores(call, call.bias, score, *reference.positions(call), jnp.arange(call.q.shape[2]))
    score = jnp.where(reference.allowed_pairs(call), score, -jnp.inf)
    top = score.max(axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.exp(score - top)
    total = weights.sum(axis=-1, keepdims=True)
    filled = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bhls,bshd->blhd", (weights / filled).astype(v.dtype), v)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(filled))[..., 0]
    return out, jnp.moveaxis(lse, 1, 2)


def check(run: Run, case: Case, runs: int = 2, forward_only: bool = False) -> dict[str, Any]:
    """For each result its error and the one allowed; `repeats`: all runs gave the same bits; `passed`: all is well."""
    names, results_of = (("out", "lse"), _forward) if forward_only else (tuple(ALLOWED), _results)
    call, cotangents = case.call(), case.cotangents()
    step = jax.jit(functools.partial(results_of, run))
    ours, *more = (jax.tree.map(np.asarray, step(call, *cotangents)) for _ in range(runs))
    truth, rounded = _expected(case, results_of)
    results = {name: _compare(name, ours[name], truth[name], rounded[name]) for name in names}
    repeats = all(np.array_equal(ours[name], again[name], equal_nan=True) for again in more for name in names)
    return {"case": str(case), "repeats": repeats, "passed": repeats and all(x["passed"] for x in results.values()), **results}


@functools.lru_cache(maxsize=1)
def _expected(case: Case, results_of: Callable) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """In float32, and with the dense form's roundings; kept for the next implementation of the same call."""
    call, cotangents = case.call(), case.cotangents()
    exact = dataclasses.replace(
        call, spans=None, q=call.q.astype(jnp.float32), k=call.k.astype(jnp.float32), v=call.v.astype(jnp.float32)
    )
    with jax.default_matmul_precision("highest"):
        truth = jax.jit(functools.partial(results_of, reference.attend))(exact, *cotangents)
    rounded = jax.jit(functools.partial(results_of, dense))(call, *cotangents)
    return tuple({name: np.asarray(x) for name, x in found.items()} for found in (truth, rounded))


def _forward(run: Run, call: Call, *cotangents: jax.Array) -> dict[str, jax.Array]:
    return dict(zip(("out", "lse"), run(call)))


def _results(run: Run, call: Call, dout: jax.Array, dlse: jax.Array) -> dict[str, jax.Array]:
    def loss(operands):
        out, lse = run(dataclasses.replace(call, **operands))
        total = (out.astype(jnp.float32) * dout).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * dlse).sum()
        return total, {"out": out, "lse": lse}

    gradients, results = jax.grad(loss, has_aux=True)({name: getattr(call, name) for name in OPERANDS})
    gradients["bias"] = jnp.concatenate([jnp.zeros(1), *(x.ravel() for x in jax.tree.leaves(gradients["bias"]))])
    return results | {f"d{name}": gradient for name, gradient in gradients.items()}


def _compare(name: str, ours, truth, rounded) -> dict[str, Any]:
    """The errors over what is finite; infinities must be where they belong."""
    ours, truth, rounded = (np.asarray(x, np.float32) for x in (ours, truth, rounded))
    finite = np.isfinite(truth)
    error, theirs = (float(abs(x[finite] - truth[finite]).max(initial=0)) for x in (ours, rounded))
    allowed = ALLOWED[name] * theirs + 1e-5
    same_gaps = np.array_equal(np.isfinite(ours), finite) and np.array_equal(ours[~finite], truth[~finite])
    return {"error": error, "allowed": allowed, "passed": bool(same_gaps and error <= allowed)}
