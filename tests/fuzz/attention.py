"""`attend` on random shapes, types, masks and options, right and wrong, against dense attention in float64."""

import dataclasses
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Dropout, attend, biases, masks
from tests.fuzz.judge import Case, WrongResult
from tests.fuzz.scans import compare, damage, numbers

CLEAR = re.compile(r"^(attend: |\w+(\(.*\))?: |masks of )")
SECONDS = 60.0
SHAPES = ((1, 1, 1), (2, 3, 3), (1, 5, 9), (1, 9, 5), (1, 70, 70))
"""Batch, queries, keys."""
HEADS = ((1, 1), (4, 4), (4, 2))
SIZE = 4
INTEGERS = (-3, -1, 0, 1, 2, 5, 64, 2**30, 10**12, 1.5, "2", None, True)


def simple_mask(rng: random.Random, queries: int, keys: int) -> str:
    """The expression of a mask that fits so many queries and keys."""
    n = rng.choice((1, 2, 3, 7, 64))
    rows = -(-max(queries, keys) // n)
    last = rng.randrange(max(queries, keys))
    return rng.choice(
        (
            "Full()", "Causal()", f"Window({n})", f"Window({n}, dilation={rng.choice((1, 2))})", f"Strided({n})",
            f"Fixed({n}, {rng.choice((1, n))})", f"BlockLocal({n})", f"BlockLocal({n}, 1, {rng.choice((0, 1))})",
            f"Global((0, {last}))", f"GlobalKeys([{last}])", f"Band({n}, 0)", f"Band({n}, {rng.choice((-n, -1, 2))})",
            f"random_blocks({n}, {-(-min(queries, keys) // n)}, 2, {n})", f"butterfly({n}, {-(-min(queries, keys) // n)})",
            "Predicate(odd_sum)", f"Blocks({n}, ([[0], []] * {rows})[:{rows}])",
        )
    )  # fmt: skip


def odd_sum(q_pos, kv_pos):
    return (q_pos + kv_pos) % 2 == 1


def any_mask(rng: random.Random, queries: int, keys: int, heads: int) -> str:
    """The expression of a mask as documented: one, or a combination of two."""
    a, b = simple_mask(rng, queries, keys), simple_mask(rng, queries, keys)
    per_head = f"PerHead([{', '.join([a, b] * (heads // 2) or [a])}])"
    return rng.choice((a, f"{a} & {b}", f"{a} | {b}", f"{a} & ~{b}", per_head))


def odd_mask(rng: random.Random) -> str:
    """The expression of a mask whose fields are drawn blindly: mostly refused."""
    build = rng.choice(
        (masks.Window, masks.Strided, masks.BlockLocal, masks.Band, masks.Fixed, masks.Global, masks.Local1D, masks.PerHead)
    )
    fields = [field for field in dataclasses.fields(build) if field.init and not field.name.startswith("_")]
    return f"{build.__name__}({', '.join(repr(rng.choice(INTEGERS)) for _ in fields)})"


BAD = {
    "mask": (
        "None", "'causal'", "True", "np.ones((3, 3), bool)", "jnp.ones((2, 1, 3, 3), bool)", "Causal", "lambda q, k: k <= q",
        "Band(-2, 0)", "Band(2, -3)", "Band(1, 1, 0)", "Window(0)", "Window(2.5)", "Strided(0)", "Fixed(2, 3)", "BlockLocal(-1)",
        "Global(())", "Global((-1,))", "Global((10**12,))", "GlobalKeys('a')", "random_blocks(0, 64, 16, 1)", "butterfly(4, 0)",
        "PerHead(())", "PerHead([Causal()] * 3)", "PerHead(Causal())", "Causal() & 'x'", "permuted(2, (0, 0))", "Band(0, 10**12)",
        "Window(2**20, 2**20)", "Local1D(2, 10**12)", "Local2D(2**20, 2**20, 1, 1, 0, 0)", "Blocks(2, 3)", "Blocks(2, [['a']])",
        "Blocks(1, [[10**12]])",
    ),
    "bias": ("Dense(jnp.zeros((9, 9, 9, 9)))", "Dense(3)", "Dense(None)", "Dense('x')", "Dense([[1.0]])", "jnp.zeros((3, 3))"),
    "dropout": (
        "0.1", "Dropout(1.0, key(0))", "Dropout(-0.1, key(0))", "Dropout(2, None)", "Dropout('x', key(0))",
        "Dropout(None, key(0))", "Dropout(float('nan'), key(0))", "Dropout(True, key(0))", "Dropout(0.5, None)",
        "Dropout(0.5, 3)", "Dropout(0.5, split(key(0), 3))", "Dropout(0.5, jnp.zeros(2))",
    ),
    "softcap": ("0", "-1.0", "'x'", "float('nan')", "True"),
    "scale": ("float('inf')", "'x'", "jnp.float32(0.5)", "True"),
    "implementation": ("'no such'", "3", "''"),
    "return_lse": ("None", "1", "'yes'"),
}  # fmt: skip
"""What `attend`, or a constructor, must refuse, whatever the other arguments are."""
NAMES = {
    **vars(masks), **vars(biases), "np": np, "jnp": jnp, "Dropout": Dropout, "key": jax.random.key, "split": jax.random.split,
    "odd_sum": odd_sum,
}  # fmt: skip


def any_bias(rng: random.Random, batch: int, queries: int, keys: int, heads: int) -> Any:
    def slope(score, q_pos, kv_pos, head, p):
        return score - p[head] * abs(q_pos - kv_pos)

    return rng.choice(
        (
            lambda: biases.Dense(jnp.asarray(numbers(rng, (rng.choice((1, batch)), rng.choice((1, heads)), queries, keys)))),
            lambda: biases.Function(slope, jnp.asarray(numbers(rng, (heads,)))),
        )
    )()


def arguments_of(rng: random.Random) -> dict[str, Any]:
    (batch, queries, keys), (heads, groups) = rng.choice(SHAPES), rng.choice(HEADS)
    dtype = rng.choice(("float32", "float32", "bfloat16"))
    shapes = {
        "q": (batch, queries, heads, SIZE),
        "k": (batch, keys, groups, SIZE),
        "v": (batch, keys, groups, rng.choice((SIZE, 2))),
    }
    given: dict[str, Any] = {name: jnp.asarray(numbers(rng, shape), dtype) for name, shape in shapes.items()}
    draw = np.random.default_rng(rng.getrandbits(32))
    ids = [np.sort(draw.integers(0, 3, (batch, n)), axis=1).astype(np.int32) for n in (queries, keys)]
    if rng.random() < 0.3:
        given["segment_ids"] = tuple(map(jnp.asarray, ids)) if queries != keys or rng.random() < 0.5 else jnp.asarray(ids[0])
    if rng.random() < 0.2:
        given["q_positions"] = jnp.asarray(draw.integers(-5, 90, rng.choice(((queries,), (batch, queries)))), jnp.int32)
    if rng.random() < 0.2:
        given["kv_positions"] = jnp.asarray(draw.integers(-5, 90, (keys,)), jnp.int32)
    if rng.random() < 0.2:
        given["softcap"] = rng.choice((1.5, 30))
    if rng.random() < 0.2:
        given["scale"] = rng.choice((0.3, 1, -2.0))
    if rng.random() < 0.3:
        given["return_lse"] = True
    if rng.random() < 0.6:
        given["implementation"] = rng.choice(("chunked", "reference"))
    return given


def expected(
    q, k, v, mask=None, bias=None, segment_ids=None, q_positions=None, kv_positions=None, softcap=None, scale=None,
    dropout=None, return_lse=False, implementation=None,
):  # fmt: skip
    """The output and the log-sum-exp of a call that is as documented."""
    mask = masks.Full() if mask is None else mask
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    (batch, queries, heads, size), keys = q.shape, k.shape[1]
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    score = np.einsum("bqhd,bkhd->bhqk", q, k) * (size**-0.5 if scale is None else scale)
    score = score if softcap is None else softcap * np.tanh(score / softcap)
    q_pos = np.arange(keys - queries, keys) if q_positions is None else np.asarray(q_positions)
    kv_pos = np.arange(keys) if kv_positions is None else np.asarray(kv_positions)
    q_pos, kv_pos = np.atleast_2d(q_pos)[:, None, :, None], np.atleast_2d(kv_pos)[:, None, None, :]
    if bias is not None:
        score = np.asarray(
            bias.score(jnp.asarray(score, jnp.float32), q_pos, kv_pos, np.arange(heads)[None, :, None, None]), np.float64
        )
    of_heads = [mask] * heads if not isinstance(mask, masks.PerHead) else list(mask.masks)
    allowed = [np.broadcast_to(np.asarray(m.allowed(q_pos, kv_pos)), (batch, 1, queries, keys)) for m in of_heads]
    allowed = np.concatenate(allowed, axis=1)
    if segment_ids is not None:
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        allowed = allowed & (np.asarray(of_q)[:, None, :, None] == np.asarray(of_k)[:, None, None, :])
    score = np.where(allowed, score, -np.inf)
    with np.errstate(all="ignore"):
        lse = np.logaddexp.reduce(score, axis=-1)
        weights = np.where(allowed, np.exp(score - lse[..., None]), 0)
    if dropout is not None:
        weights = weights * np.asarray(dropout.scale(*map(jnp.arange, weights.shape)), np.float64)
    return np.einsum("bhqk,bkhd->bqhd", weights, v), np.swapaxes(lse, 1, 2)


def check(given: dict[str, Any]) -> str:
    """Whether `attend` gives what the specification gives."""
    got = attend(**given)
    out, lse = got if given.get("return_lse") else (got, None)
    right, right_lse = expected(**given)
    tolerance = 4e-2 if given["q"].dtype == jnp.bfloat16 else 2e-4
    compare("output", np.asarray(out, np.float64), right, tolerance)
    if lse is not None:
        lse = np.asarray(lse, np.float64)
        if not np.array_equal(np.isneginf(lse), np.isneginf(right_lse)):
            raise WrongResult("lse: rows without a pair")
        compare("lse", np.where(np.isneginf(lse), 0, lse), np.where(np.isneginf(right_lse), 0, right_lse), tolerance)
    return "right"


def case(rng: random.Random) -> Case:
    """A sound call; one that is sound but for an argument of `BAD`; or one with arguments damaged, or a mask drawn, blindly."""
    given = arguments_of(rng)
    (batch, queries, heads, _), keys = given["q"].shape, given["k"].shape[1]
    told, expects = {}, rng.choices(("right", "refused", None), (5, 2, 3))[0]
    if rng.random() < 0.75:
        told["mask"] = any_mask(rng, queries, keys, heads)
    if rng.random() < 0.15:
        told["dropout"] = f"Dropout({rng.choice((0.0, 0.5))}, key(0))"
    bias = any_bias(rng, batch, queries, keys, heads) if rng.random() < 0.25 else None
    how = "as documented"
    if expects == "refused":
        name = rng.choice(list(BAD))
        told[name], how = rng.choice(BAD[name]), f"bad {name}"
        given.pop(name, None)
    elif expects is None:
        how = "odd"
        if rng.random() < 0.3:
            told["mask"] = odd_mask(rng)
        elif rng.random() < 0.1:
            given["implementation"] = rng.choice(("xla", "cudnn"))
        else:
            how = "; ".join(damage(rng, given) for _ in range(rng.choice((1, 1, 2))))
    if bias is not None and "bias" not in told:
        given["bias"] = bias

    def build_and_check() -> str:
        built = {name: eval(expression, NAMES) for name, expression in told.items()}  # what a constructor refuses is refused here
        return check({**given, **built})

    shapes = {k: (str(v.dtype), v.shape) if isinstance(v, np.ndarray | jax.Array) else v for k, v in given.items()}
    expressions = " ".join(f"{name}={expression}" for name, expression in told.items())
    return Case(f"{how}: {expressions} {shapes}"[:500], build_and_check, expects)
