"""Relative attention with terms that depend on the query: Shaw's labels for keys and values, and Transformer-XL's."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.positions.absolute import sinusoid
from efficient_attn.positions.base import EVERY_PAIR, Places
from kernels.attention import Dropout, masks, merge


@flax.struct.dataclass
class ShawTerms:
    """score_ij = q_i . (k_j + a^K_r) scale and out_i = sum_j p_ij (v_j + a^V_r), r = clip(j - i, -K, K) + K.

    Shaw et al. 2018 (arXiv 1803.02155, eq. 3 and 4). Exact, in memory O(L K): all keys K or more tokens before the query share
    one label, whose terms are one number a row and one vector; so do those after. The 2K - 1 offsets between are summed one by
    one, and the three parts merged by log-sum-exp.

    keys, values: a^K and a^V, [2K + 1, D] and [2K + 1, Dv], shared by the heads.
    """

    keys: Any
    values: Any

    def of_scores(self) -> "ShawTerms":
        """Itself without a^V: what the weights are, whatever the values."""
        return self.replace(values=jnp.zeros_like(self.values[:, :1]))

    def attend(
        self, function, places: Places, q, k, v, *, mask: masks.Mask = EVERY_PAIR, return_lse: bool = False,
        scale: float | None = None, bias=None, softcap=None, **options,
    ):  # fmt: skip
        if bias is not None or softcap is not None:
            raise ValueError("bias 'shaw' changes scores and values itself: it goes with no other bias and no soft-cap")
        K = self.keys.shape[0] // 2
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        parts = []
        for label, side in ((0, masks.Causal()), (2 * K, ~masks.Causal())):
            if k.shape[1] <= K or (places.causal and label):
                continue
            far = mask & side & ~masks.Window(K)
            moved = v + self.values[label].astype(v.dtype)[None, None, None]
            out, lse = function(q, k, moved, mask=far, scale=scale, return_lse=True, **options)
            term = jnp.einsum("blhd,d->blh", q.astype(lse.dtype), self.keys[label].astype(lse.dtype))
            parts.append((out, lse + scale * term))
        offsets = jnp.arange(1 - K, 1 if places.causal else K, dtype=jnp.int32)
        parts.append(_Band(self, places, q, k, v, mask, scale, options).attend(offsets))
        out, lse = merge(parts)
        return (out, lse) if return_lse else out


class _Band:
    """Attention to the keys at a few offsets from each query, an offset at a time."""

    def __init__(self, terms: ShawTerms, places: Places, q, k, v, mask: masks.Mask, scale: float, options):
        B, L, H, D = q.shape
        self.dtype = jnp.promote_types(q.dtype, jnp.float32)
        self.places, self.k, self.v, self.mask, self.options, self.out_dtype = places, k, v, mask, options, q.dtype
        self.keys, self.values = (x.astype(self.dtype) for x in (terms.keys, terms.values))
        self.q = scale * q.astype(self.dtype).reshape(B, L, k.shape[2], H // k.shape[2], D)

    def attend(self, offsets: Int[Array, "n"]) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
        scores = jax.lax.map(jax.checkpoint(self._scores), offsets)
        top = jax.lax.stop_gradient(scores.max(axis=0))
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(scores - top[None])
        total = weights.sum(axis=0)
        is_empty = total == 0
        total = jnp.where(is_empty, 1, total)
        zeros = jnp.zeros((*total.shape, self.v.shape[-1]), self.dtype)
        out, _ = jax.lax.scan(jax.checkpoint(self._add), zeros, (offsets, weights / total[None]))
        return out.astype(self.out_dtype), jnp.where(is_empty, -jnp.inf, top + jnp.log(total))

    def _scores(self, offset) -> Float[Array, "B L H"]:
        index, label, _ = self._at(offset)
        k = jnp.take_along_axis(self.k, index[:, :, None, None], axis=1).astype(self.dtype)
        products = jnp.einsum("blgrd,blgd->blgr", self.q, k) + jnp.einsum("blgrd,bld->blgr", self.q, self.keys[label])
        return jnp.where(self._allowed(offset), products.reshape(*products.shape[:2], -1), -jnp.inf)

    def _add(self, total: Float[Array, "B L H Dv"], offset_and_weights):
        offset, weights = offset_and_weights
        index, label, _ = self._at(offset)
        v = jnp.take_along_axis(self.v, index[:, :, None, None], axis=1).astype(self.dtype)
        v = jnp.repeat(v, weights.shape[2] // v.shape[2], axis=2) + self.values[label][:, :, None]
        return total + (weights * self._kept(index))[..., None] * v, None

    def _at(self, offset) -> tuple[Int[Array, "B L"], Int[Array, "B L"], Bool[Array, "_ L"]]:
        """Of the key at this offset: its index (where there is none, some other's), its label, and whether there is one."""
        shape, S = self.q.shape[:2], self.k.shape[1]
        index = self.places.index + offset
        is_there = (index >= 0) & (index < S)
        index = jnp.broadcast_to(jnp.clip(index, 0, S - 1), shape)
        K = self.keys.shape[0] // 2
        kv = jnp.take_along_axis(jnp.broadcast_to(self.places.kv, (shape[0], S)), index, axis=1)
        return index, jnp.clip(kv - self.places.q, -K, K) + K, is_there

    def _allowed(self, offset) -> Bool[Array, "_ L h"]:
        index, _, is_there = self._at(offset)
        (B, L), S = index.shape, self.k.shape[1]
        q_pos, kv_pos = self.options.get("q_positions"), self.options.get("kv_positions")
        q_pos = jnp.arange(S - L, S, dtype=jnp.int32) if q_pos is None else q_pos
        kv_pos = jnp.arange(S, dtype=jnp.int32) if kv_pos is None else kv_pos
        kv_pos = jnp.take_along_axis(jnp.broadcast_to(jnp.atleast_2d(kv_pos), (B, S)), index, axis=1)
        pair = jnp.broadcast_to(jnp.atleast_2d(q_pos), (B, L)), kv_pos
        allowed = jnp.stack([head.allowed(*pair) for head in masks.of_heads(self.mask)], axis=-1) & is_there[..., None]
        segments = self.options.get("segment_ids")
        if segments is None:
            return allowed
        q_segments, kv_segments = segments if isinstance(segments, tuple) else (segments, segments)
        return allowed & (q_segments == jnp.take_along_axis(kv_segments, index, axis=1))[..., None]

    def _kept(self, index: Int[Array, "B L"]) -> Float[Array, "B L H"] | float:
        """The same dropout of weights as in the other parts: a function of the indices of query and key."""
        dropout: Dropout | None = self.options.get("dropout")
        if dropout is None:
            return 1.0
        B, L, G, R, _ = self.q.shape

        def row(b, i, j):
            return dropout.scale(b[None], jnp.arange(G * R), i[None], j[None])[0, :, 0, 0]

        rows = jax.vmap(jax.vmap(row, in_axes=(None, 0, 0)), in_axes=(0, None, 0))
        return rows(jnp.arange(B), jnp.arange(L), index)


@flax.struct.dataclass
class TransformerXLTerms:
    """score_ij = ((q_i + u) . k_j + (q_i + v) . W_R R_{i-j}) scale, R_n = [sin | cos] (n / base^(2m/E)).

    Dai et al. 2019 (arXiv 1901.02860, section 3.3). Exact in memory O(L E): with c_i = W_R^T (q_i + v) and the addition theorems,
    c_i . R_{i-j} is a product of what depends on i and [cos | sin] of j, so that the term becomes E more channels of queries
    and keys, and any implementation of attention computes it, without a table of labels or the paper's shift.

    u, v: [H, D]. W_R: [E, H, D], E even.
    """

    u: Any
    v: Any
    W_R: Any
    base: float = flax.struct.field(pytree_node=False, default=10_000.0)

    def attend(self, function, places: Places, q, k, v, *, scale: float | None = None, **options):
        c = jnp.einsum("blhd,ehd->blhe", q + self.v.astype(q.dtype)[None, None], self.W_R.astype(q.dtype))
        c_sin, c_cos = jnp.split(c.astype(jnp.promote_types(c.dtype, jnp.float32)), 2, axis=-1)
        sin, cos = (x[:, :, None] for x in sinusoid(places.q, self.W_R.shape[0], self.base, c_sin.dtype))
        with_cos, with_sin = c_sin * sin + c_cos * cos, c_cos * sin - c_sin * cos
        wide_q = jnp.concatenate([q + self.u.astype(q.dtype)[None, None], with_cos.astype(q.dtype), with_sin.astype(q.dtype)], -1)
        sin, cos = sinusoid(places.kv, self.W_R.shape[0], self.base, c_sin.dtype)
        of_keys = jnp.concatenate([cos, sin], axis=-1)[:, :, None].astype(k.dtype)
        wide_k = jnp.concatenate([k, jnp.broadcast_to(of_keys, (*k.shape[:3], of_keys.shape[-1]))], axis=-1)
        return function(wide_q, wide_k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale, **options)
