"""Decoding on Hopper: few queries of each sequence against keys and values in a row, or in blocks of a pool.

What `decode_kernel` can run, how a call is cut for it, and the merging of its parts. The keys of each sequence are cut by its own
length, so that ragged sequences leave no program without work that another has.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import devices
from kernels.attention.call import Call, Spec
from kernels.attention.masks import Causal, Full
from kernels.attention.merge import merge_stacked

ROWS = 64
"""Rows of a product of Hopper's tensor cores, of which the heads of a group and their tokens fill some."""

HEAD_SIZES = (64, 128, 256)
DTYPES = ("bfloat16", "float16")
KEYS = 64
"""Keys of a tile at most: a cache in a row is a whole number of them, blocks of a pool divide them or are divided by them."""

FEW = 8
"""How many times as many keys as queries there are at least in calls of `attend`; for others `mosaic` has a backward pass too."""

PROCESSORS = 132
"""Of an H200: as many programs run at a time."""

OVERHEAD = 4
"""What a program takes before the first tile arrives and after the last, in tiles."""

MAX_SPLITS = 256


class Blocks(NamedTuple):
    """Keys of a tile, how many tiles are in shared memory at a time, and consumers, which take tiles in turn: a stage belongs to
    one of them, so that there is a multiple of as many."""

    keys: int
    stages: int
    consumers: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a call is cut: each sequence's keys in so many parts of equal length; `heads` of a group are rows of each token."""

    blocks: Blocks
    splits: int
    heads: int
    softcap: float | None
    scale: float
    interpret: bool


def table(kind: str = devices.FALLBACK) -> dict[int, Blocks]:
    """The blocks of each head size on such a device (`kernels/blocks`)."""
    return {size: Blocks(**entry) for size, entry in devices.blocks("decode", kind)["forward"].items()}


def splits(programs: int, tiles: int) -> int:
    """Into how many parts the keys are cut: what takes least, of waves of programs times the tiles of one and its overhead."""

    def cost(parts: int) -> int:
        return -(-programs * parts // PROCESSORS) * (-(-tiles // parts) + OVERHEAD)

    return min(range(1, min(tiles, MAX_SPLITS) + 1), key=cost)


def why_not(spec: Spec) -> str | None:
    """The reason the kernel cannot run a call of `attend`."""
    reasons = _shared(spec.platform, spec.dtype, spec.head_dim, spec.v_head_dim, spec.heads // spec.kv_heads * spec.q_length) | {
        f"it has the masks Full and Causal, not {type(spec.mask).__name__}": not isinstance(spec.mask, Full | Causal),
        f"it is for queries of at most 1 / {FEW} of the keys, not {spec.q_length} of {spec.kv_length}": (
            spec.q_length * FEW > spec.kv_length
        ),
        f"keys must be a multiple of {KEYS}, not {spec.kv_length}": spec.kv_length % KEYS,
        "keys must be at their default positions": spec.traced_kv_positions,
        f"it has no biases, as {spec.bias}": spec.bias is not None,
        "it has no segment ids": spec.segment_ids,
        "it has no dropout": spec.dropout,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def why_not_blocks(spec) -> str | None:
    """The reason the kernel cannot run a call of `paged.attend`, of its `Spec`."""
    reasons = _shared(spec.platform, spec.dtype, spec.head_dim, spec.v_head_dim, spec.heads // spec.kv_heads) | {
        f"blocks must hold 8, 16, 32 or a multiple of {KEYS} tokens, not {spec.block_size}": (
            spec.block_size not in (8, 16, 32) and spec.block_size % KEYS
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _shared(platform: str, dtype: str, head_dim: int, v_head_dim: int, rows: int) -> dict[str, Any]:
    sizes = {head_dim, v_head_dim}
    return {
        f"it is written for NVIDIA GPUs, and interpreted on cpu, not for {platform}": platform not in ("cpu", "gpu"),
        f"tensor cores take {' and '.join(DTYPES)}, not {dtype}": dtype not in DTYPES,
        f"heads of queries, keys and values must be of one size in {HEAD_SIZES}, not {sorted(sizes)}": (
            len(sizes) > 1 or head_dim not in HEAD_SIZES
        ),
        f"it has {ROWS} rows for the query heads of a group and their tokens, not {rows}": rows > ROWS,
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be said of the cut; None: the device's table, what `splits` finds, and interpreted where the device is a CPU."""

    blocks: Blocks | None = None
    splits: int | None = None
    interpret: bool | None = None

    def cut(self, heads: int, head_dim: int, programs: int, slots: int, softcap: float | None, scale: float) -> Cut:
        blocks = self.blocks or table(devices.here())[head_dim]
        if blocks.stages % blocks.consumers:
            raise ValueError(f"decode: {blocks}: stages must be a multiple of consumers, of which each waits for its own alone")
        parts = self.splits or splits(programs, -(-slots // blocks.keys))
        interpret = jax.default_backend() == "cpu" if self.interpret is None else self.interpret
        return Cut(blocks, parts, heads, softcap, scale, interpret)


Forward = Callable[[Call], tuple[Float[Array, "B L H D"], Float[Array, "B L H"]]]


def attend(
    otherwise: Forward, call: Call, options: Options = Options()
) -> tuple[Float[Array, "B L H D"], Float[Array, "B L H"]]:  # fmt: skip
    """The same function as `reference.attend`; gradients are those of `otherwise`, another form of it."""
    return _attend(otherwise, options, call)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(otherwise: Forward, options: Options, call: Call):
    return attend_rows(call.q, call.k, call.v, limits(call), softcap=call.softcap, scale=call.scale, options=options)


def _attend_forward(otherwise: Forward, options: Options, call: Call):
    return _attend(otherwise, options, call), call


def _attend_backward(otherwise: Forward, options: Options, call: Call, cotangents):
    _, pullback = jax.vjp(otherwise, call)
    return pullback(cotangents)


_attend.defvjp(_attend_forward, _attend_backward)


def limits(call: Call) -> Int[Array, "B L"]:
    """How many of the first keys each token sees."""
    (B, L), S = call.q.shape[:2], call.k.shape[1]
    if isinstance(call.mask, Full):
        return jnp.full((B, L), S, jnp.int32)
    last = jnp.arange(S - L, S)[None] if call.q_positions is None else call.q_positions
    return jnp.broadcast_to(jnp.clip(last, -1, S - 1).astype(jnp.int32) + 1, (B, L))


def attend_rows(q, k, v, seen: Int[Array, "B L"], *, softcap: float | None, scale: float, options: Options = Options()):
    """out and lse [B, L, H] where token l of a sequence sees its first seen[:, l] keys."""
    from kernels.attention.mosaic.decode_kernel import InRows

    _, S, G, _ = k.shape
    return run(options, q, seen, InRows(k, v), kv_heads=G, slots=S, softcap=softcap, scale=scale)


def attend_blocks(
    q, k_blocks, v_blocks, tables, lengths, *, softcap: float | None, scale: float, options: Options = Options()
):  # fmt: skip
    """The same function as `paged.reference`."""
    from kernels.attention.mosaic.decode_kernel import InBlocks

    G, _, n, _ = k_blocks.shape
    seen = jnp.clip(lengths, 0, tables.shape[1] * n).astype(jnp.int32)[:, None]
    cache = InBlocks(k_blocks, v_blocks, tables.astype(jnp.int32))
    out, lse = run(options, q[:, None], seen, cache, kv_heads=G, slots=tables.shape[1] * n, softcap=softcap, scale=scale)
    return out[:, 0], lse[:, 0]


def run(options: Options, q, seen: Int[Array, "B L"], cache, *, kv_heads: int, slots: int, softcap: float | None, scale: float):
    """Of q [B, L, H, D] and a cache of `slots` keys a sequence: out, and lse [B, L, H]; token l sees the first seen[:, l]."""
    from kernels.attention.mosaic import decode_kernel

    (B, L, H, D), G, heads = q.shape, kv_heads, q.shape[2] // kv_heads
    cut = options.cut(heads, D, B * G, slots, softcap, scale)
    rows = jnp.moveaxis(q.reshape(B, L, G, heads, D), 2, 1).reshape(B, G, L * heads, D)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -(L * heads) % 8), (0, 0)))
    out, lse = (x[:, :, :, : L * heads] for x in decode_kernel.run(cut, rows, seen, cache))
    out, lse = merge_stacked(out, lse)
    out = jnp.moveaxis(out.reshape(B, G, L, heads, D), 1, 2).reshape(B, L, H, D)
    return out.astype(q.dtype), jnp.moveaxis(lse.reshape(B, G, L, heads), 1, 2).reshape(B, L, H)
