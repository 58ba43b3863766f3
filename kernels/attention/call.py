"""One attention call in normal form: what every implementation receives (`Call`), and what decides which can run it (`Spec`)."""

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import mesh
from kernels.attention.biases import Bias
from kernels.attention.masks import Mask
from kernels.dispatch import shown

ARRAYS = ["q", "k", "v", "bias", "q_segments", "kv_segments", "q_positions", "kv_positions", "dropout", "spans"]
"""The fields of a `Call` that hold arrays, in order."""


Variants = tuple[tuple[tuple[int, int], tuple[int, int]], ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["which"], meta_fields=["variants"])
@dataclasses.dataclass(frozen=True)
class Spans:
    """What is known of traced positions before tracing: one of `variants`, by the traced number `which`.

    A variant is ((start, step) of queries, (start, step) of keys): index i stands at position start + step i. An implementation
    may skip the tiles that the mask rules out there; it may also leave it.
    """

    which: Any
    variants: Variants


@functools.partial(jax.tree_util.register_dataclass, data_fields=ARRAYS, meta_fields=["mask", "softcap", "scale"])
@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of `attend`, checked and completed; what is absent is None.

    q [B, L, H, D], k [B, S, G, D], v [B, S, G, Dv], bias a `Bias`, q_segments [B, L] and kv_segments [B, S], q_positions
    [1 or B, L] and kv_positions [1 or B, S], dropout a `Dropout`, spans a `Spans`. Positions that are None are the default ones,
    known before tracing: queries S - L ... S - 1, keys 0 ... S - 1. The fields of a pytree have no checked types: JAX rebuilds
    it around whatever a transformation makes of its leaves.
    """

    q: Any
    k: Any
    v: Any
    bias: Any
    q_segments: Any
    kv_segments: Any
    q_positions: Any
    kv_positions: Any
    dropout: Any
    spans: Any = None
    mask: Mask = dataclasses.field(kw_only=True)
    softcap: float | None = dataclasses.field(kw_only=True)
    scale: float = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static facts of a call.

    `bias` is the name of its class, `bias_gathers` whether its rule indexes arrays, `bias_by_distance` as `Bias.by_distance`,
    and `bias_whole_axes` the lengths of its arrays' axes that a tile takes whole; `bias_pairs`, whether one of them has an axis
    of queries and one of keys; `traced_positions`, that positions were given, `traced_kv_positions`, those of keys;
    `sequence_shards`, over how many devices the mesh spreads a sequence.
    """

    batch: int
    q_length: int
    kv_length: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    mask: Mask
    bias: str | None
    bias_gathers: bool
    bias_whole_axes: tuple[int, ...]
    segment_ids: bool
    traced_positions: bool
    softcap: bool
    dropout: bool
    return_lse: bool
    platform: str
    bias_pairs: bool = False
    bias_by_distance: bool = False
    sequence_shards: int = 1
    traced_kv_positions: bool = False


def spec_of(call: Call, return_lse: bool, platform: str) -> Spec:
    """The facts of `call`, whose arrays may be `jax.ShapeDtypeStruct`s."""
    B, L, H, D = call.q.shape
    return Spec(
        batch=B,
        q_length=L,
        kv_length=call.k.shape[1],
        heads=H,
        kv_heads=call.k.shape[2],
        head_dim=D,
        v_head_dim=call.v.shape[3],
        dtype=str(call.q.dtype),
        mask=call.mask,
        bias=None if call.bias is None else type(call.bias).__name__,
        bias_gathers=call.bias is not None and call.bias.gathers,
        bias_whole_axes=() if call.bias is None else _whole_axes(call.bias),
        segment_ids=call.q_segments is not None,
        traced_positions=call.q_positions is not None or call.kv_positions is not None,
        softcap=call.softcap is not None,
        dropout=call.dropout is not None,
        return_lse=return_lse,
        platform=platform,
        bias_pairs=call.bias is not None and _holds_pairs(call.bias),
        bias_by_distance=call.bias is not None and call.bias.by_distance,
        sequence_shards=mesh.shards(mesh.SEQ),
        traced_kv_positions=call.kv_positions is not None,
    )


def _holds_pairs(bias: Bias) -> bool:
    shapes = zip(jax.tree.leaves(bias), bias.axes(), strict=True)
    return any({"L", "S"} <= {name for name, n in zip(at, leaf.shape) if n > 1} for leaf, at in shapes)


def _whole_axes(bias: Bias) -> tuple[int, ...]:
    shapes = zip(jax.tree.leaves(bias), bias.axes(), strict=True)
    return tuple(n for leaf, at in shapes for name, n in zip(at, leaf.shape) if name is None)


def statistics_dtype(dtype) -> jnp.dtype:
    """The type of scores, softmax statistics and accumulators: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def check_scores(name: str, softcap: float | None, scale: float | None) -> None:
    """Raise `ValueError`, by the name of the entry point, where what the scores are made with is no number it can be."""
    if softcap is not None and not (_is_number(softcap) and 0 < softcap < math.inf):
        raise ValueError(f"{name}: softcap={shown(softcap)}; give a positive number, or None for none")
    if scale is not None and not (_is_number(scale) and math.isfinite(scale)):
        raise ValueError(f"{name}: scale={shown(scale)}; give a number known before tracing, or None for 1 / sqrt(D)")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def default_positions(L: int, S: int) -> tuple[Int[Array, "1 L"], Int[Array, "1 S"]]:
    """Bottom-right alignment: the last query stands at the last key."""
    return jnp.arange(S - L, S)[None], jnp.arange(S)[None]


def transform_scores(
    call: Call,
    bias: Bias | None,
    score: Float[Array, "B H q k"],
    q_pos: Int[Array, "_ q"],
    kv_pos: Int[Array, "_ k"],
    head: Int[Array, "H"],
) -> Float[Array, "B H q k"]:
    """Soft-cap, then bias, of scaled scores; the order of Gemma 2 and FlashAttention. `bias` is cut to these scores."""
    if call.softcap is not None:
        score = call.softcap * jnp.tanh(score / call.softcap)
    if bias is None:
        return score
    new = bias.score(score, q_pos[:, None, :, None], kv_pos[:, None, None, :], head[None, :, None, None])
    if new.shape != score.shape:
        raise ValueError(f"attend: bias {type(bias).__name__} makes scores {new.shape} of {score.shape}; the shape must stay")
    return new
