"""Every mask with sizes that fit it, and the criterion by which an implementation is judged, for tests over all of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention
from kernels.attention import explain, tiles
from kernels.attention.masks import (
    Band,
    BlockLocal,
    Blocks,
    Causal,
    Fixed,
    Full,
    Global,
    GlobalKeys,
    Local1D,
    Local2D,
    Mask,
    PerHead,
    Predicate,
    Strided,
    Window,
    butterfly,
    of_heads,
    permuted,
    random_blocks,
)

TESTED_APART = frozenset({"cudnn", "decode", "mosaic", "ring"})
"""Implementations that take no float32, or need a mesh, and have tests of their own."""

SMALL_TILES = tiles.TileSizes((8, 16), (8, 16), keys=32, scores=1024, visit_overhead=100)
"""Tiles of at most 16 x 32, so that short sequences have many."""

SCATTERED = tuple(range(0, 64, 3))

MASKS: dict[str, tuple[Mask, int, int, int]] = {
    "full": (Full(), 65, 65, 2),
    "causal": (Causal(), 65, 65, 2),
    "causal, more keys": (Causal(), 33, 65, 2),
    "causal, more queries": (Causal(), 65, 33, 2),
    "window": (Window(7), 65, 65, 2),
    "dilated window": (Window(4, dilation=5), 65, 65, 2),
    "band": (Band(11, -2), 65, 65, 2),
    "strided": (Causal() & (Band(9, 0) | Strided(9)), 65, 65, 2),
    "fixed": (Causal() & (BlockLocal(12) | Fixed(12, 3, shift=1)), 65, 65, 2),
    "global": (Global((0, 1, 30)) | Window(3), 65, 65, 2),
    "scattered global": (Global(SCATTERED), 65, 65, 2),
    "global keys": (Causal() & (GlobalKeys((0,)) | Window(4)), 65, 65, 2),
    "blocks in a row": (BlockLocal(9, before=1, after=1), 65, 65, 2),
    "table of blocks": (Blocks(16, ((4,), (), (0, 1), (3,), (2, 4))), 65, 65, 2),
    "permuted blocks": (permuted(17, (2, 3, 0, 1)), 65, 65, 2),
    "butterfly": (butterfly(8, 9), 65, 65, 2),
    "bigbird": (random_blocks(8, 9, 1, seed=0) | BlockLocal(8, 1, 1) | Global((*range(8), *range(56, 65))), 65, 65, 2),
    "local 1D": (Local1D(8, 12), 65, 65, 2),
    "local 2D": (Causal() & Local2D(6, 11, 2, 4, 1, 2), 66, 66, 2),
    "all but": (~(Window(20) | Causal()), 65, 65, 2),
    "nothing": (Causal() & ~Causal(), 17, 17, 2),
    "predicate": (Predicate(lambda q, k: (k <= q) & (k % 7 != 3)), 65, 65, 2),
    "predicate in jnp": (Predicate(lambda q, k: jnp.abs(q - 2 * k) < 9), 65, 65, 2),
    "by head": (PerHead((Causal(), Window(5), Causal(), Blocks(33, ((1,), (0,))))), 65, 65, 4),
    "by head, combined": (Causal() & PerHead((Band(8, 0), Strided(8))), 65, 65, 2),
}
"""name: (mask, L, S, heads). Every named mask, and combinations as published models use them."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call, and seed of its arrays; `large` multiplies queries."""

    L: int
    S: int
    H: int = 2
    G: int = 2
    D: int = 4
    Dv: int = 4
    B: int = 1
    large: float = 1.0

    def arguments(self, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v: the same numbers whatever the type."""
        rng = np.random.default_rng(0)
        shapes = (self.B, self.L, self.H, self.D), (self.B, self.S, self.G, self.D), (self.B, self.S, self.G, self.Dv)
        q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        return jnp.asarray(self.large * q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)

    def cotangents(self, dtype) -> tuple[jax.Array, jax.Array]:
        """What `out` and `lse` are weighted by in the loss whose gradients are compared."""
        rng = np.random.default_rng(1)
        weights = rng.normal(size=(self.B, self.L, self.H, self.Dv)), rng.normal(size=(self.B, self.L, self.H))
        return tuple(jnp.asarray(x.astype(np.float32), dtype) for x in weights)


def reason_against(name: str, sizes: Sizes, **options: Any) -> str | None:
    """Why the implementation cannot run such a call, in its own words."""
    q, k, v = sizes.arguments(jnp.float32)
    reason = explain(q, k, v, **options, implementation="reference").others.get(name, "")
    return f"{name} {reason}" if reason.startswith("cannot") else None


def allowed_pairs(mask: Mask, L: int, S: int) -> np.ndarray:
    """[h, L, S] at default positions."""
    pairs = np.arange(S - L, S)[:, None], np.arange(S)[None]
    return np.stack([np.broadcast_to(mask.allowed(*pairs), (L, S)) for mask in of_heads(mask)])


def dense(q, k, v, allowed) -> tuple[jax.Array, jax.Array]:
    """Attention with every score in memory and its log-sum-exp, on pairs allowed [h, L, S]; written for these tests alone."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("blhd,bshd->bhls", q, k, precision="highest") / q.shape[3] ** 0.5
    scores = jnp.where(allowed[None], scores, -jnp.inf)
    is_empty = ~allowed.any(axis=2)[None] & (scores[..., 0] == scores[..., 0])
    top = jnp.where(is_empty, 0, jax.lax.stop_gradient(scores.max(axis=-1)))
    weights = jnp.exp(scores - top[..., None])
    total = jnp.where(is_empty, 1, weights.sum(axis=-1))
    out = jnp.einsum("bhls,bshd->blhd", weights / total[..., None], v, precision="highest")
    return out, jnp.moveaxis(jnp.where(is_empty, -jnp.inf, top + jnp.log(total)), 1, 2)


def all_results(fn: Callable, sizes: Sizes, dtype, return_lse: bool) -> list[np.ndarray]:
    """out, lse, and the gradients by q, k and v of a loss over both; `fn(q, k, v)` gives the pair, or out alone."""
    weights, lse_weights = sizes.cotangents(dtype)

    def loss(q, k, v):
        out, lse = fn(q, k, v) if return_lse else (fn(q, k, v), jnp.zeros_like(lse_weights))
        return (out * weights).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * lse_weights).sum(), (out, lse)

    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*sizes.arguments(dtype))
    return [np.asarray(x) for x in (*results, *gradients)]


@functools.cache
def _dense_gradient(return_lse: bool):
    """Of the dense form, compiled once for each set of shapes, whatever the mask."""

    def loss(q, k, v, allowed, weights, lse_weights):
        out, lse = dense(q, k, v, allowed)
        lse = lse if return_lse else jnp.zeros_like(lse)
        return (out * weights).sum() + (jnp.where(jnp.isfinite(lse), lse, 0) * lse_weights).sum(), (out, lse)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def dense_results(mask: Mask, sizes: Sizes, dtype, return_lse: bool) -> list[np.ndarray]:
    """What `all_results` gives, of the dense form."""
    allowed = np.broadcast_to(allowed_pairs(mask, sizes.L, sizes.S), (sizes.H, sizes.L, sizes.S))
    gradient = _dense_gradient(return_lse)
    gradients, results = gradient(*sizes.arguments(dtype), jnp.asarray(allowed), *sizes.cotangents(dtype))
    return [np.asarray(x) for x in (*results, *gradients)]


def check_errors(name: str, mask: Mask, sizes: Sizes) -> None:
    """FlashAttention's criterion: error against float64 at most twice that of the dense float32 form, + 1e-6.

    For out, the log-sum-exp where the implementation has a differentiable one, and the gradients by q, k and v.
    """
    return_lse = reason_against(name, sizes, mask=mask, return_lse=True) is None
    attend = functools.partial(attention.attend, mask=mask, return_lse=return_lse, implementation=name)
    ours = all_results(attend, sizes, jnp.float32, return_lse)
    rounded = dense_results(mask, sizes, jnp.float32, return_lse)
    with jax.enable_x64(True):
        exact = dense_results(mask, sizes, jnp.float64, return_lse)
    for what, x, y, truth in zip(("out", "lse", "dq", "dk", "dv"), ours, rounded, exact, strict=True):
        at = np.isfinite(truth)
        np.testing.assert_array_equal(x[~at], truth[~at], err_msg=what)
        assert np.isfinite(x[at]).all(), what
        error, allowed = abs(x[at] - truth[at]).max(initial=0), 2 * abs(y[at] - truth[at]).max(initial=0) + 1e-6
        assert error <= allowed, f"{what}: error {error:.2e} of {name}, {allowed:.2e} allowed"
