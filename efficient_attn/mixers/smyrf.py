"""SMYRF: attention inside balanced clusters that asymmetric hashing finds (Daras et al. 2020, arXiv 2010.05315)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.mixers.content import LAST, NOBODY, ContentAttention, take
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.lsh import merge_rounds, sorted_rows
from kernels.attention import Dropout, attend

REFUSES_DOCUMENTS = "smyrf: hashes measure by the longest vectors of the row, so one document would decide what another sees"

Vectors = Float[Array, "B L H D2"]


def asymmetric(q: Float[Array, "B L H D"], k: Float[Array, "B L H D"], mask: Bool[Array, "B L"]) -> tuple[Vectors, Vectors]:
    """F(q) = [q, 0, sqrt(M^2 - |q|^2)] and G(k) = [k, sqrt(M^2 - |k|^2), 0] with M^2 = M_q^2 + M_k^2 (eq. 5).

    M_q and M_k are the largest lengths of unmasked queries and keys of the row and head. All F and G then have length M, and
    |F(q) - G(k)|^2 = 2 (M^2 - q . k): the nearest keys are those of the largest products.
    """
    q, k = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k))
    squares = [jnp.where(mask[:, :, None, None], jnp.sum(x**2, axis=-1, keepdims=True), 0) for x in (q, k)]
    M2 = sum(jnp.max(square, axis=1, keepdims=True) for square in squares)
    rest_q, rest_k = (jnp.sqrt(jnp.maximum(M2 - square, 0)) for square in squares)
    return jnp.concatenate([q, jnp.zeros_like(rest_q), rest_q], axis=-1), jnp.concatenate([k, rest_k, jnp.zeros_like(rest_k)], -1)


def clusters(x: Vectors, directions: Float[Array, "H D2 R"], mask: Bool[Array, "B L"]) -> Int[Array, "B H R L"]:
    """In each round, tokens in the order of their projections on a random direction (algorithm 1), padding last.

    Cut into pieces of one size these are balanced clusters: E2LSH's buckets, with borders where the data put them.
    """
    hashes = jnp.einsum("blhd,hdr->bhrl", x, directions.astype(x.dtype))
    return jnp.argsort(jnp.where(mask[:, None, None], hashes, jnp.inf), axis=-1).astype(jnp.int32)


def smyrf_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H Dv"],
    q_order: Int[Array, "B H R L"],
    k_order: Int[Array, "B H R L"],
    *,
    cluster_size: int,
    mask: Bool[Array, "B L"] | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """The c-th cluster of queries attends the c-th of keys; rounds are merged by their log-sum-exp. Time O(L R cluster_size).

    A pair that meets in several rounds counts in each, as in the paper.
    """
    B, H, R, L = q_order.shape
    mask = jnp.ones((B, L), bool) if mask is None else mask
    pad = -L % cluster_size

    def pieces(x, order):  # [B, L, H, D] -> [B H R n, cluster_size, 1, D]
        rows = jnp.pad(sorted_rows(x, order.reshape(-1, L)), ((0, 0), (0, pad), (0, 0)))
        return rows.reshape(-1, cluster_size, 1, x.shape[-1])

    def segments(order, nobody: int):
        real = take(jnp.broadcast_to(mask[:, None, None], order.shape).reshape(-1, L), order.reshape(-1, L))
        return jnp.where(jnp.pad(real, ((0, 0), (0, pad))), 0, nobody).reshape(-1, cluster_size)

    out, lse = attend(
        pieces(q, q_order),
        pieces(k, k_order),
        pieces(v, k_order),
        segment_ids=(segments(q_order, LAST), segments(k_order, NOBODY)),
        dropout=dropout,
        return_lse=True,
        implementation=implementation,
    )
    places = jnp.argsort(q_order.reshape(-1, L), axis=-1)
    return merge_rounds(out.reshape(B * H * R, L + pad, -1), lse.reshape(B * H * R, L + pad), places, (B, H, R))[0]


class Smyrf(ContentAttention):
    """Queries and keys in clusters of one size each, found in several rounds; bidirectional only.

    cluster_size: queries, and keys, of a cluster.
    rounds: hash rounds that are merged.
    seed: of the directions outside training. Layers draw the same ones unless given different seeds, by a tuple of mixer dicts.
    resample: draw new directions at every step of training, from the `dropout` stream.

    In one cluster of everything it is softmax attention, which is how the paper puts it in the place of a trained model's.
    """

    cluster_size: int = 64
    rounds: int = 4
    seed: int = 0
    resample: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self.check(ctx, cluster_size=self.cluster_size, rounds=self.rounds)
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
        q, k, v = (self.project(x, name) for name in ("query", "key", "value"))
        mask = jnp.ones(x.shape[:2], bool) if ctx.mask is None else ctx.mask
        key = self.make_rng("dropout") if ctx.train and self.resample else jax.random.key(self.seed)
        directions = jax.random.normal(key, (self.num_heads, q.shape[-1] + 2, self.rounds))
        hashed = asymmetric(*jax.lax.stop_gradient((q, k)), mask)
        out = smyrf_attention(
            q,
            k,
            v,
            *(clusters(y, directions, mask) for y in hashed),
            cluster_size=min(self.cluster_size, x.shape[1]),
            mask=mask,
            dropout=self.weights_dropout(ctx),
            implementation=self.implementation,
        )
        return self.output(out, x.shape[-1])
