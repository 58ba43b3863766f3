"""`attend` on random shapes, types, masks and options, right and wrong, against dense attention in float64."""

import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Dropout, attend, biases, masks
from tests.fuzz.scans import compare, damage, numbers

CLEAR = re.compile(r"^(attend: |\w+(\(.*\))?: |masks of )")
SECONDS = 60.0
SHAPES = ((1, 1, 1), (2, 3, 3), (1, 5, 9), (1, 9, 5), (1, 70, 70))
"""Batch, queries, keys."""
HEADS = ((1, 1), (4, 4), (4, 2))
SIZE = 4
INTEGERS = (-3, -1, 0, 1, 2, 5, 64, 10**12, 1.5, "2", None, True)


def simple_mask(rng: random.Random) -> masks.Mask:
    n = rng.choice((1, 2, 3, 7, 64))
    return rng.choice(
        (
            masks.Full(), masks.Causal(), masks.Window(n), masks.Window(n, dilation=rng.choice((1, 2))), masks.Strided(n),
            masks.Fixed(n, rng.choice((1, n))), masks.BlockLocal(n), masks.Global((0, rng.choice((1, 5)))), masks.Band(-n, 0),
            masks.random_blocks(0, 64, 16, 1),
        )
    )  # fmt: skip


def any_mask(rng: random.Random, heads: int) -> masks.Mask:
    """A mask as documented: one, or a combination of two."""
    a, b = simple_mask(rng), simple_mask(rng)
    return rng.choice(
        (lambda: a, lambda: a & b, lambda: a | b, lambda: a & ~b, lambda: masks.PerHead([a, b] * (heads // 2) or [a]))
    )()


def no_mask(rng: random.Random) -> Any:
    """What `attend`, or a mask's constructor, must refuse, mostly."""
    if rng.random() < 0.4:
        return rng.choice(
            (None, "causal", True, np.ones((3, 3), bool), jnp.ones((2, 1, 3, 3), bool), masks.Causal, lambda q, k: k <= q)
        )
    build = rng.choice(
        (masks.Window, masks.Strided, masks.BlockLocal, masks.Band, masks.Fixed, masks.Global, masks.Local1D, masks.PerHead)
    )
    fields = [field for field in dataclasses.fields(build) if field.init and not field.name.startswith("_")]
    return build(*(rng.choice(INTEGERS) for _ in fields))


def any_bias(rng: random.Random, batch: int, queries: int, keys: int, heads: int) -> Any:
    def slope(score, q_pos, kv_pos, head, p):
        return score - p[head] * abs(q_pos - kv_pos)

    return rng.choice(
        (
            lambda: biases.Dense(jnp.asarray(numbers(rng, (rng.choice((1, batch)), rng.choice((1, heads)), queries, keys)))),
            lambda: biases.Function(slope, jnp.asarray(numbers(rng, (heads,)))),
        )
    )()


def no_bias(rng: random.Random, batch: int, queries: int, keys: int, heads: int) -> Any:
    return rng.choice(
        (
            lambda: biases.Dense(jnp.asarray(numbers(rng, (batch, heads, keys + 1, queries)))),
            lambda: biases.Dense(rng.choice((3, None, "x", [[1.0]]))),
            lambda: jnp.zeros((queries, keys)),
        )
    )()


def arguments_of(rng: random.Random, wrong: bool) -> dict[str, Any]:
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
        given["softcap"] = rng.choice((0, -1.0, "x", float("nan")) if wrong else (1.5, 30))
    if rng.random() < 0.2:
        given["scale"] = rng.choice((float("inf"), "x", jnp.float32(0.5)) if wrong else (0.3, 1, -2.0))
    if rng.random() < 0.3:
        given["return_lse"] = True
    if rng.random() < 0.6:
        given["implementation"] = rng.choice(("xla", "cudnn", "no such", 3) if wrong else ("chunked", "reference"))
    return given


def expected(
    q, k, v, mask=None, bias=None, segment_ids=None, q_positions=None, kv_positions=None, softcap=None, scale=None,
    return_lse=False, implementation=None,
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
    return np.einsum("bhqk,bkhd->bqhd", weights, v), np.swapaxes(lse, 1, 2)


def case(rng: random.Random) -> tuple[str, Callable[[], str]]:
    wrong = rng.random() < 0.6
    given = arguments_of(rng, wrong and rng.random() < 0.3)
    batch, queries, heads, _ = given["q"].shape
    keys, how = given["k"].shape[1], "as documented"
    draws = rng.getrandbits(32)
    if wrong and rng.random() < 0.7:
        how = "; ".join(damage(rng, given) for _ in range(rng.choice((1, 1, 2))))
    with_mask, with_bias, with_dropout = rng.random() < 0.7, rng.random() < 0.25, rng.random() < 0.08
    shapes = {k: (str(v.dtype), v.shape) if isinstance(v, np.ndarray | jax.Array) else v for k, v in given.items()}

    def check() -> str:
        own = random.Random(draws)  # a mask that its constructor refuses is refused here
        if with_mask:
            given["mask"] = no_mask(own) if wrong and own.random() < 0.5 else any_mask(own, heads)
        if with_bias:
            make = no_bias if wrong and own.random() < 0.5 else any_bias
            given["bias"] = make(own, batch, queries, keys, heads)
        if with_dropout:
            dropout = own.choice((Dropout(0.5, jax.random.key(0)), Dropout(own.choice((1.0, -0.1, 2)), None), 0.1))
            got = attend(**given, dropout=dropout)
            assert isinstance(dropout, Dropout) and dropout.rate == 0.5, f"accepted {dropout!r}"
            out = got[0] if given.get("return_lse") else got
            assert out.shape == (*given["q"].shape[:3], given["v"].shape[3]), "shape of the output"
            return "right shape"
        got = attend(**given)
        out, lse = got if given.get("return_lse") else (got, None)
        right, right_lse = expected(**given)
        low = given["q"].dtype == jnp.bfloat16
        compare("output", np.asarray(out, np.float64), right, 4e-2 if low else 2e-4)
        if lse is not None:
            lse = np.asarray(lse, np.float64)
            assert np.array_equal(np.isneginf(lse), np.isneginf(right_lse)), "rows without a pair"
            compare(
                "lse", np.where(np.isneginf(lse), 0, lse), np.where(np.isneginf(right_lse), 0, right_lse), 4e-2 if low else 2e-4
            )
        return "right"

    return f"{how} mask={with_mask} bias={with_bias} dropout={with_dropout} {shapes}"[:500], check
