"""Routing Transformer: attention inside clusters that online k-means finds (Roy et al. 2020, arXiv 2003.05997)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.content import ContentAttention, take
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.lsh import others
from kernels.attention import Dropout, attend, masks

REFUSES_DOCUMENTS = "routing: a cluster takes its tokens from the whole row, so one document would decide what another sees"


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length one, in float32 at least; zero stays zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def similarities(x: Float[Array, "B L H D"], centroids: Float[Array, "H K D"]) -> Float[Array, "B H K L"]:
    """Cosines of tokens and centroids (of unit length), which order as distances of vectors of one length do."""
    return jnp.einsum("blhd,hkd->bhkl", unit(x), centroids.astype(unit(x).dtype))


def members(
    x: Float[Array, "B L H D"], centroids: Float[Array, "H K D"], size: int, mask: Bool[Array, "B L"] | None = None
) -> Int[Array, "B H K w"]:
    """The `size` tokens nearest to each centroid, in the order of their positions; padding where real ones do not suffice."""
    near = similarities(jax.lax.stop_gradient(x), centroids)
    near = near if mask is None else jnp.where(mask[:, None, None], near, -jnp.inf)
    return jnp.sort(jax.lax.top_k(near, size)[1], axis=-1)


def routing_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H Dv"],
    q_members: Int[Array, "B H K w"],
    k_members: Int[Array, "B H K u"],
    *,
    causal: bool = False,
    shared: bool = False,
    mask: Bool[Array, "B L"] | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """Attention inside each cluster (algorithm 1), in O(K w u).

    A token in several clusters gets the mean of what it finds in them, and one that is in none, or finds no key, 0.

    shared: queries are the keys. A token then sees the others of its cluster, and itself only if there are none.
    """
    (B, L, H, _), K = q.shape, q_members.shape[2]
    valid = jnp.zeros((B, L), jnp.int32) if mask is None else mask.astype(jnp.int32)
    valid = jnp.broadcast_to(valid[:, None], (B, H, L)).reshape(B * H, L)

    def gathered(x, index):  # [B, L, H, D] -> [B H K, w, 1, D]
        rows = take(jnp.moveaxis(x, 2, 1).reshape(B * H, L, -1), index.reshape(B * H, -1))
        return rows.reshape(B * H * K, index.shape[-1], 1, -1)

    def of_clusters(index):
        return take(valid, index.reshape(B * H, -1)).reshape(B * H * K, -1)

    out, lse = attend(
        gathered(q, q_members),
        gathered(k, k_members),
        gathered(v, k_members),
        mask=others(causal) if shared else masks.Causal() if causal else masks.Full(),
        q_positions=q_members.reshape(B * H * K, -1),
        kv_positions=k_members.reshape(B * H * K, -1),
        segment_ids=(of_clusters(q_members), of_clusters(k_members)),
        dropout=dropout,
        return_lse=True,
        implementation=implementation,
    )
    finds = lse != -jnp.inf
    if shared:
        out, finds = jnp.where(finds[..., None], out, gathered(v, q_members)), jnp.ones_like(finds)
    index, rows = q_members.reshape(B * H, -1), jnp.arange(B * H)[:, None]
    out = jnp.where(finds[..., None], out, 0).reshape(B * H, index.shape[1], -1)
    total = jnp.zeros((B * H, L, v.shape[-1]), out.dtype).at[rows, index].add(out)
    count = jnp.zeros((B * H, L), out.dtype).at[rows, index].add(finds.reshape(index.shape).astype(out.dtype))
    return jnp.moveaxis((total / jnp.maximum(count, 1)[..., None]).reshape(B, H, L, -1), 1, 2)


def updated(
    centroids: Float[Array, "H K D"], x: Float[Array, "B L H D"], decay: float, mask: Bool[Array, "B L"] | None = None
) -> Float[Array, "H K D"]:
    """One step of online k-means on the sphere: each centroid moves by 1 - decay towards the mean of the tokens nearest to it.

    Centroids that no token is nearest to stay; all keep length one.
    """
    nearest = jnp.argmax(similarities(x, centroids), axis=2)
    is_nearest = jax.nn.one_hot(nearest, centroids.shape[1], axis=2, dtype=centroids.dtype)
    is_nearest = is_nearest if mask is None else is_nearest * mask[:, None, None]
    count = jnp.sum(is_nearest, axis=(0, 3))[..., None]
    mean = jnp.einsum("bhkl,blhd->hkd", is_nearest, unit(x).astype(centroids.dtype)) / jnp.maximum(count, 1)
    return jnp.where(count > 0, unit(decay * centroids + (1 - decay) * unit(mean)), centroids)


def commitment(
    x: Float[Array, "B L H D"], centroids: Float[Array, "H K D"], mask: Bool[Array, "B L"] | None = None
) -> Float[Array, ""]:
    """Mean squared distance, per channel, of unit vectors from their nearest centroids."""
    nearest = jnp.argmax(similarities(jax.lax.stop_gradient(x), centroids), axis=2)
    chosen = jnp.moveaxis(jax.vmap(lambda mu, at: mu[at], (0, 1), 1)(centroids, nearest), 1, 2)
    weights = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
    squares = jnp.mean((unit(x) - chosen) ** 2, axis=(2, 3))
    return jnp.sum(squares * weights) / jnp.maximum(jnp.sum(weights), 1)


class Routing(ContentAttention):
    """Heads that attend inside clusters of their tokens, beside heads that attend locally (section 4).

    num_clusters: K, sqrt(L) in the paper.
    cluster_size: w, tokens that each cluster takes; None means L / K. A token may be in several clusters or in none.
    local_heads: how many of the heads are local instead, in blocks of `block_size` that see their neighbours; None means half.
    share_qk: one projection for queries and keys; None means where causal (algorithm 1).
    decay: lambda, of the running centroids, which training moves in the collection `centroids`.
    commitment: weight of the loss that draws tokens to their centroids, sown while training (released code; 0 leaves it out).

    Queries and keys of routing heads are normalised without learned scale or bias, so that the nearest centroid is that of the
    largest product. The causal form never reads a later token, but which tokens are in a cluster depends on all of the row;
    therefore it does not decode.
    """

    num_clusters: int = 16
    cluster_size: int | None = None
    local_heads: int | None = None
    block_size: int = 64
    share_qk: bool | None = None
    decay: float = 0.999
    commitment: float = 1e-4

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self.check(ctx, num_clusters=self.num_clusters)
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
        local = self.num_heads // 2 if self.local_heads is None else self.local_heads
        if not 0 <= local <= self.num_heads:
            raise ConfigError(f"routing: local_heads={local} must be between 0 and num_heads={self.num_heads}")
        parts = [self._local(x, ctx, local)] if local else []
        if local < self.num_heads:
            parts.append(self._routed(x, ctx, self.num_heads - local))
        return self.output(jnp.concatenate(parts, axis=2), x.shape[-1])

    def _local(self, x, ctx: Context, heads: int) -> Float[Array, "B L H D"]:
        near = masks.BlockLocal(self.block_size, 1, 0 if self.causal else 1)
        return attend(
            *(self.project(x, f"local_{name}", heads) for name in ("query", "key", "value")),
            mask=masks.Causal() & near if self.causal else near,
            segment_ids=ctx.groups(),
            dropout=self.weights_dropout(ctx),
            implementation=self.implementation,
        )

    def _routed(self, x, ctx: Context, heads: int) -> Float[Array, "B L H D"]:
        shared = self.causal if self.share_qk is None else self.share_qk
        q = self._normalised(self.project(x, "query_key" if shared else "query", heads))
        k = q if shared else self._normalised(self.project(x, "key", heads))
        shape = (heads, self.num_clusters, q.shape[-1])
        mu = self.variable("centroids", "mu", lambda: unit(jax.random.normal(self.make_rng("params"), shape)))
        size = min(x.shape[1], self.cluster_size or -(-x.shape[1] // self.num_clusters))
        q_members = members(q, mu.value, size, ctx.mask)
        out = routing_attention(
            q,
            k,
            self.project(x, "value", heads),
            q_members,
            q_members if shared else members(k, mu.value, size, ctx.mask),
            causal=self.causal,
            shared=shared,
            mask=ctx.mask,
            dropout=self.weights_dropout(ctx),
            implementation=self.implementation,
        )
        if ctx.train:
            self._learn(mu, [q] if shared else [q, k], ctx)
        return out

    def _normalised(self, x):
        return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=self.dtype)(x)

    def _learn(self, mu, tokens: list, ctx: Context) -> None:
        """Move the centroids, and sow the loss that moves the tokens."""
        x = jnp.concatenate(tokens, axis=1)
        mask = None if ctx.mask is None else jnp.concatenate([ctx.mask] * len(tokens), axis=1)
        if self.commitment:
            self.sow("losses", "commitment", self.commitment * commitment(x, mu.value, mask))
        if self.is_mutable_collection("centroids"):
            mu.value = updated(mu.value, jax.lax.stop_gradient(x), self.decay, mask)
