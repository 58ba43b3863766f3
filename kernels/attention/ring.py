"""Ring attention: a sequence that is spread over the devices of the mesh's axis seq (Liu et al. 2023, arXiv 2310.01889).

Each device keeps its stretch of queries, and the stretches of keys and values go round. At each of n steps a device attends to
the stretch it has, by any implementation of `attend`, and merges the result with what it has so far through the log-sum-exp. The
backward pass sends keys, values and their gradients round once more and computes every part again from the log-sum-exp of the
whole, so that a device never holds more than its share: memory O(L / n), forward and backward.

Under a causal mask contiguous stretches would leave the first device idle and give the last one twice the mean. Where a mask is
so uneven, and n^2 divides L, the tokens are dealt out first: device r takes positions r, r + n, r + 2n, ... (striped attention,
Brandon et al. 2023, arXiv 2311.09431), by one all-to-all of queries, keys and values, and one of the result. Masks see positions,
and tiles that a mask rules out at them are skipped (`call.Spans`), so each device then has the same work.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels import mesh
from kernels.attention import sharded
from kernels.attention.call import Call, Spans, Spec, statistics_dtype
from kernels.attention.masks import SKIP, Mask, of_heads
from kernels.attention.merge import Part, merge
from kernels.dispatch import Choice
from kernels.matmul import inner

TILES = 256
"""Into so many parts a stretch is cut, at most, to estimate the work of its device."""

UNEVEN = 1.25
"""Tokens are dealt out where the busiest device would have so many times the mean work."""

Local = Callable[[Call], Part]


def why_not(spec: Spec) -> str | None:
    """The reason a call cannot go round a ring."""
    n = spec.sequence_shards
    reasons = {
        "the mesh it is traced under has no axis seq of several devices": n == 1,
        f"queries ({spec.q_length}) and keys ({spec.kv_length}) must be the same tokens": spec.q_length != spec.kv_length,
        f"the {n} devices along seq do not divide the length {spec.q_length}; pad it to a multiple": bool(spec.q_length % n),
        f"the bias {spec.bias} holds an array of L x S pairs, of which no stretch of keys has its own part": spec.bias_pairs,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def attend(local: Local, call: Call) -> Part:
    """The same function as `reference.attend`, of a call whose arrays are split along L over the axis seq.

    local: attention to one stretch of keys; its log-sum-exp must be differentiable.
    """
    ring = _Ring.of(local, call)
    return sharded.attend(ring.attend, call, sequence=True)


def told(choice: Choice, call: Call) -> Choice:
    """`choice`, which where it is the ring also says which tokens each device has."""
    n, L = mesh.shards(mesh.SEQ), call.q.shape[1]
    if choice.name != "ring" or not _is_plain(call):
        return choice
    striped, steps = layout(call.mask, L, n)
    tokens = f"every {n}th token" if striped else f"{L // n} neighbouring tokens"
    return dataclasses.replace(choice, reason=f"{choice.reason}; each device has {tokens}, and there are {steps} steps")


@functools.lru_cache(maxsize=256)
def layout(mask: Mask, L: int, n: int) -> tuple[bool, int]:
    """(whether tokens are dealt out, how many steps of the ring there are) for L tokens on n devices."""
    stretch = L // n
    size = max(64, -(-stretch // TILES))
    lo = (np.arange(n)[:, None] * stretch + np.arange(0, stretch, size)).ravel()
    device = lo // stretch  # no tile is on two
    hi = np.minimum(lo + size, (device + 1) * stretch) - 1
    wanted = sum(np.asarray(m.tile(lo[:, None], hi[:, None], lo[None], hi[None])) != SKIP for m in of_heads(mask)) > 0
    work = np.zeros((n, n), int)
    np.add.at(work, (device[:, None], device[None]), wanted)
    is_uneven = work.sum(1).max() > UNEVEN * work.sum(1).mean()
    if is_uneven and L % n**2 == 0:
        return True, n
    shifts = (np.arange(n)[:, None] - np.arange(n)[None]) % n
    return False, 1 + int(shifts[work > 0].max(initial=0))


def _is_plain(call: Call) -> bool:
    """Whether the tokens stand where they are in the sequence."""
    return call.q_positions is None and call.kv_positions is None


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The static facts: n devices, whether tokens are dealt out, how many steps to go, and how to put a call together."""

    local: Local
    n: int
    striped: bool
    steps: int
    size: int
    bias: Any
    axes: tuple
    rest: Any

    @classmethod
    def of(cls, local: Local, call: Call) -> "_Ring":
        n, L = mesh.shards(mesh.SEQ), call.q.shape[1]
        striped, steps = layout(call.mask, L, n) if _is_plain(call) else (False, n)
        leaves, structure = jax.tree.flatten(call.bias)
        axes = [] if call.bias is None else call.bias.axes()
        axes = tuple(tuple(a if size > 1 else None for a, size in zip(at, leaf.shape)) for at, leaf in zip(axes, leaves))
        return cls(local, n, striped, steps, L // n, structure, axes, (call.mask, call.softcap, call.scale))

    def attend(self, call: Call) -> Part:
        """This device's part of the call."""
        leaves = jax.tree.leaves(call.bias)
        is_moving = ["S" in at for at in self.axes]
        queries = self.deal({"q": call.q, "bias": [None if m else x for x, m in zip(leaves, is_moving)]}, "L")
        keys = self.deal({"k": call.k, "v": call.v, "bias": [x if m else None for x, m in zip(leaves, is_moving)]}, "S")
        fixed = self.deal({"segments": call.q_segments, "positions": call.q_positions}, "L") | {"dropout": call.dropout}
        moving = self.deal({"segments": call.kv_segments, "positions": call.kv_positions}, "S")
        out, lse = _go_round(self, queries, keys, fixed, moving)
        return self.collect(out).astype(call.q.dtype), self.collect(lse)

    def deal(self, arrays: dict[str, Any], name: str) -> dict[str, Any]:
        """The arrays with this device's tokens along the axis called `name`: position r + n i at index i, if they are dealt."""
        if not self.striped:
            return arrays

        def deal(x, axis):
            parts = x.reshape(*x.shape[:axis], -1, self.n, *x.shape[axis + 1 :])
            return lax.all_to_all(parts, mesh.SEQ, axis + 1, axis, tiled=True).reshape(x.shape)

        def of(key, value):
            if key == "bias":
                return [x if x is None or name not in at else deal(x, at.index(name)) for x, at in zip(value, self.axes)]
            return None if value is None else deal(value, 1)

        return {key: of(key, value) for key, value in arrays.items()}

    def collect(self, x):
        """What `deal` undoes, along axis 1."""
        if not self.striped:
            return x
        parts = x.reshape(x.shape[0], self.n, -1, 1, *x.shape[2:])
        return lax.all_to_all(parts, mesh.SEQ, 1, 3, tiled=True).reshape(x.shape)

    def span(self, device) -> tuple[Any, int]:
        """(start, step): the tokens of a device stand at start, start + step, ..."""
        return (device, self.n) if self.striped else (device * self.size, 1)

    def step(self, s, queries, keys, fixed, moving) -> Part:
        """Attention to the keys that have come s devices far."""
        own = lax.axis_index(mesh.SEQ)
        other = (own - s) % self.n
        (q_start, stride), (kv_start, _) = self.span(own), self.span(other)
        index = jnp.arange(self.size, dtype=jnp.int32)[None] * stride
        is_plain = fixed["positions"] is None and moving["positions"] is None
        pairs = [(i, j) for i in range(self.n) for j in range(self.n)]
        spans = Spans(own * self.n + other, tuple((self.span(i), self.span(j)) for i, j in pairs)) if is_plain else None
        dropout = fixed["dropout"]
        if dropout is not None:
            starts = jnp.stack([q_start, kv_start]).astype(jnp.uint32)
            dropout = dataclasses.replace(dropout, origin=dropout.origin.at[2:].add(starts), stride=stride)
        leaves = [a if b is None else b for a, b in zip(queries["bias"], keys["bias"])]
        mask, softcap, scale = self.rest
        return self.local(
            Call(
                queries["q"],
                keys["k"],
                keys["v"],
                jax.tree.unflatten(self.bias, leaves),
                fixed["segments"],
                moving["segments"],
                q_start + index if fixed["positions"] is None else fixed["positions"],
                kv_start + index if moving["positions"] is None else moving["positions"],
                dropout,
                spans,
                mask=mask,
                softcap=softcap,
                scale=scale,
            )
        )

    def send(self, tree, shift: int = 1):
        """Arrays from the device `shift` before this one."""
        return jax.tree.map(lambda x: lax.ppermute(x, mesh.SEQ, [(i, (i + shift) % self.n) for i in range(self.n)]), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _go_round(ring: _Ring, queries, keys, fixed, moving) -> Part:
    """This device's out and lse, in the type of softmax statistics."""
    (B, L, H, _), dtype = queries["q"].shape, statistics_dtype(queries["q"].dtype)

    def step(s, carry):
        keys, moving, so_far = carry
        part = ring.step(s, queries, keys, fixed, moving)
        return *ring.send((keys, moving)), merge([so_far, part])

    nothing = jnp.zeros((B, L, H, keys["v"].shape[3]), dtype), jnp.full((B, L, H), -jnp.inf, dtype)
    return lax.fori_loop(0, ring.steps, step, (keys, moving, nothing))[2]


def _forward(ring: _Ring, *arrays):
    part = _go_round(ring, *arrays)
    return part, (arrays, part)


def _backward(ring: _Ring, residuals, cotangents):
    """out = sum_p w_p out_p, w_p = exp(lse_p - lse): d out_p = w_p d out, d lse_p = w_p (d lse + d out . (out_p - out))."""
    (queries, keys, fixed, moving), (out, lse) = residuals
    dout, dlse = cotangents
    lse = jnp.where(lse == -jnp.inf, 0, lse)

    def step(s, carry):
        keys, moving, dkeys, dqueries = carry
        (part, part_lse), pull = jax.vjp(lambda q, k: ring.step(s, q, k, fixed, moving), queries, keys)
        weight = jnp.exp(part_lse - lse)
        through_weight = inner(dout, part.astype(dout.dtype) - out)
        more = pull(((weight[..., None] * dout).astype(part.dtype), weight * (dlse + through_weight)))
        dqueries, dkeys = jax.tree.map(lambda total, x: total + x.astype(total.dtype), (dqueries, dkeys), more)
        return *ring.send((keys, moving, dkeys)), dqueries

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, statistics_dtype(x.dtype)), (keys, queries))
    _, _, dkeys, dqueries = lax.fori_loop(0, ring.steps, step, (keys, moving, *start))
    home = -ring.steps % ring.n
    gradients = dqueries, ring.send(dkeys, home) if home else dkeys
    return *jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, (queries, keys)), None, None


_go_round.defvjp(_forward, _backward)
