"""Strided patterns by residue class: positions of one remainder modulo the stride, taken together as sequences of their own.

The keys that `Strided(s)` adds to a query lie s apart (Child et al. 2019, section 4.3), one in every tile: in the order of the
sequence no tile of s or more keys could be skipped. Ordered by residue class they are neighbours. Where a mask holds a
`Strided(s)` beside masks that go by distance alone, it is cut into two disjoint parts,

    the rest: the mask without its strided keys, in the order of the sequence, and
    the strided keys that the rest lacks: s sequences of L / s positions, as further heads, under the mask between every s-th
    position,

whose results are merged by log-sum-exp, which is exact and differentiable. As heads the sequences are a view of [B, L, H, D], and
nothing is copied; with segments, which heads share, or where s does not divide L, they are copied to be further batch rows. Heads
with masks of their own go one mask at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from kernels.attention import masks
from kernels.attention.call import Call
from kernels.attention.masks import And, Band, Causal, Full, Mask, Not, Or, Strided, Window
from kernels.attention.merge import Part, merge

SHORTEST = 1024
"""The least length at which parts are worth their overhead, on a CPU of two cores."""

NOTHING = ~Full()


def attend(call: Call, in_order: Callable[[Call], Part]) -> Part:
    """The call by its parts, or by `in_order` alone where it has none."""
    of_head = masks.of_heads(call.mask)
    if not can_be_parted(call) or all(_stride(mask) == 1 for mask in of_head):
        return in_order(call)
    if len(of_head) > 1:
        return _by_mask(call, of_head, in_order)
    rest, by_class, put_back = parts(call)
    out, lse = map(put_back, in_order(by_class))
    return merge([in_order(rest), (out, lse)])


def can_be_parted(call: Call) -> bool:
    """Whether what the call does goes by distance alone but for its mask, and the sequence is long enough to be worth it."""
    goes_by_position = any(x is not None for x in (call.bias, call.dropout, call.q_positions, call.kv_positions))
    return not goes_by_position and SHORTEST <= call.q.shape[1] == call.k.shape[1]


def parts(call: Call) -> tuple[Call, Call, Callable[[Array], Array]]:
    """The rest of a call, its strided keys by residue class, and what puts results of the latter in the sequence's order."""
    stride, L = _stride(call.mask), call.q.shape[1]
    rest = _rebuilt(call.mask, lambda leaf: NOTHING if leaf == Strided(stride) else leaf)
    strided = _every(call.mask, stride) & ~_every(rest, stride)
    q_segments, kv_segments = call.q_segments, call.kv_segments
    rest = dataclasses.replace(call, mask=rest)
    if q_segments is None and L % stride == 0:
        as_heads = {name: _as_heads(getattr(call, name), stride) for name in ("q", "k", "v")}
        return rest, dataclasses.replace(call, **as_heads, mask=strided), functools.partial(_from_heads, stride=stride)
    if q_segments is None:
        q_segments = kv_segments = jnp.zeros(call.q.shape[:2], jnp.int32)
    by_class = dataclasses.replace(
        call,
        **{name: fold(getattr(call, name), stride) for name in ("q", "k", "v")},
        q_segments=fold(q_segments, stride),
        kv_segments=fold(kv_segments, stride, _absent(q_segments)),
        mask=strided,
    )
    return rest, by_class, functools.partial(unfold, stride=stride, length=L)


def _absent(ids: Int[Array, "B L"]) -> Int[Array, ""]:
    """An id that is none of these."""
    low, high = ids.min(), ids.max()
    return jnp.where(low > jnp.iinfo(ids.dtype).min, low - 1, high + 1)


def _by_mask(call: Call, of_head: tuple[Mask, ...], in_order: Callable[[Call], Part]) -> Part:
    """The heads of each mask apart, with their keys and values, and put together in their order again."""
    results, order = [], []
    for mask in dict.fromkeys(of_head):
        heads = np.array([head for head, own in enumerate(of_head) if own == mask])
        of_keys = heads // (call.q.shape[2] // call.k.shape[2])
        k, v = call.k[:, :, of_keys], call.v[:, :, of_keys]
        results.append(attend(dataclasses.replace(call, q=call.q[:, :, heads], k=k, v=v, mask=mask), in_order))
        order.extend(heads)
    out, lse = (jnp.concatenate(of_masks, axis=2)[:, :, np.argsort(order)] for of_masks in zip(*results))
    return out, lse


def _as_heads(x: Shaped[Array, "B L H *D"], stride: int) -> Shaped[Array, "B M RH *D"]:
    """[B, L, H, ...] to [B, L / stride, stride H, ...]: head r H + h is positions r, r + stride, ... of head h."""
    B, L, H = x.shape[:3]
    return x.reshape(B, L // stride, stride * H, *x.shape[3:])


def _from_heads(x: Shaped[Array, "B M RH *D"], stride: int) -> Shaped[Array, "B L H *D"]:
    """What `_as_heads` was given."""
    B, M, RH = x.shape[:3]
    return x.reshape(B, M * stride, RH // stride, *x.shape[3:])


def fold(x: Shaped[Array, "B L *D"], stride: int, fill: Any = 0) -> Shaped[Array, "BR M *D"]:
    """[B, L, ...] to [B stride, ceil(L / stride), ...]: row b stride + r is positions r, r + stride, ... of row b, then fill."""
    B, L = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -L % stride)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    x = jnp.swapaxes(x.reshape(B, -1, stride, *x.shape[2:]), 1, 2)
    return x.reshape(B * stride, -1, *x.shape[3:])


def unfold(x: Shaped[Array, "BR M *D"], stride: int, length: int) -> Shaped[Array, "B L *D"]:
    """What `fold` was given, of its `length`."""
    x = jnp.swapaxes(x.reshape(-1, stride, *x.shape[1:]), 1, 2)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]


def _leaves(mask: Mask) -> list[Mask]:
    inner = getattr(mask, "parts", None)
    return [mask] if inner is None else [leaf for part in inner for leaf in _leaves(part)]


def _stride(mask: Mask) -> int:
    """The largest stride of a mask that has a form between every so manieth position; 1 where there is none."""
    return max(_strides(mask), default=1) if _by_distance(mask) else 1


def _strides(mask: Mask) -> list[int]:
    return [leaf.stride for leaf in _leaves(mask) if isinstance(leaf, Strided)]


def _by_distance(mask: Mask) -> bool:
    """Whether all its leaves are in `EVERY` and no strided one is negated, so that without it fewer pairs are allowed."""
    if isinstance(mask, Not):
        return not _strides(mask) and _by_distance(mask.mask)
    if isinstance(mask, And | Or):
        return all(map(_by_distance, mask.parts))
    return type(mask) in EVERY


def _rebuilt(mask: Mask, leaf: Callable[[Mask], Mask]) -> Mask:
    """The mask with every leaf replaced by leaf(it)."""
    inner = getattr(mask, "parts", None)
    return leaf(mask) if inner is None else type(mask)(*(_rebuilt(part, leaf) for part in inner))


def _every(mask: Mask, stride: int) -> Mask:
    """The mask between positions 0, stride, 2 stride, ..., counted 0, 1, 2, ...; the same in every residue class."""
    return _rebuilt(mask, lambda leaf: EVERY[type(leaf)](leaf, stride))


def _every_band(band: Band, stride: int) -> Mask:
    before, after = band.before // stride, band.after // stride
    if before < -after:
        return NOTHING
    within = Band(before, after)
    return within if band.dilation == 1 else within & _every_strided(Strided(band.dilation), stride)


def _every_strided(strided: Strided, stride: int) -> Mask:
    return Strided(strided.stride // math.gcd(strided.stride, stride))


def _every_window(window: Window, stride: int) -> Mask:
    return _every_band(window.band, stride)


def _itself(mask: Mask, stride: int) -> Mask:
    return mask


EVERY: dict[type[Mask], Callable[[Mask, int], Mask]] = {
    Full: _itself,
    Causal: _itself,
    Band: _every_band,
    Window: _every_window,
    Strided: _every_strided,
}
"""The masks that go by distance alone, with their form between every `stride`-th position."""
