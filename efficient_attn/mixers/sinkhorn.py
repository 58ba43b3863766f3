"""Sparse Sinkhorn attention: blocks attend themselves and what a learned sort puts beside them (Tay et al. 2020, 2002.11296)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.anew import decode_anew
from efficient_attn.mixers.content import NOBODY, ContentAttention
from efficient_attn.mixers.context import Context
from kernels.attention import Dropout, attend, masks

REFUSES_DOCUMENTS = "sinkhorn: a sorted block is a mixture of blocks of the whole row, so packed documents would mix"

_NEVER = -1e30
"""The logarithm of no weight: finite, so that gradients are."""


def sinkhorn(
    scores: Float[Array, "B H n n"], allowed: Bool[Array, "B n n"], iterations: int, *, causal: bool = False
) -> Float[Array, "B H n n"]:
    """Weights exp(scores) with rows and then columns divided by their sums, in turn (section 3.1.1, eqs. 3 to 5).

    In the limit rows and columns of the allowed part add up to 1: a soft permutation. Causal (section 3.3.2): a column's sum at
    row i is that over rows up to i, so that no row depends on later ones.
    """
    allowed = allowed[:, None]
    row_sums = functools.partial(jax.nn.logsumexp, axis=3, keepdims=True)
    column_sums = functools.partial(jax.nn.logsumexp, axis=2, keepdims=True)
    column_sums = functools.partial(jax.lax.cumlogsumexp, axis=2) if causal else column_sums

    def divide(log_weights, _):
        for sums in (row_sums, column_sums):
            log_weights = jnp.where(allowed, log_weights - sums(log_weights), _NEVER)
        return log_weights, None

    log_weights, _ = jax.lax.scan(divide, jnp.where(allowed, scores, _NEVER), length=iterations)
    return jnp.where(allowed, jnp.exp(log_weights), 0)


def allowed_blocks(mask: Bool[Array, "B L"], block_size: int, *, causal: bool) -> Bool[Array, "B n n"]:
    """Which block may be sorted to which: those with a real token, and where causal only earlier ones to later ones."""
    is_real = jnp.any(mask.reshape(mask.shape[0], -1, block_size), axis=2)
    allowed = is_real[:, :, None] & is_real[:, None, :]
    return allowed & jnp.tri(allowed.shape[1], k=-1, dtype=bool)[None] if causal else allowed


def sinkhorn_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H Dv"],
    sort: Float[Array, "B H n n"],
    allowed: Bool[Array, "B n n"],
    mask: Bool[Array, "B L"],
    *,
    block_size: int,
    causal: bool = False,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """Softmax over a block's own keys and those of its sorted block, sum_m sort_im block_m (section 3.2). L = n block_size.

    Time O(L block_size + L n): the second term is the product with `sort`. Keys where `mask` is False have no part in it. Where
    causal, a token sees all of its sorted block, which is made of earlier ones, and of its own block what is not after it.
    """
    (B, L, H, _), n = q.shape, sort.shape[2]
    real = mask.reshape(B, n, block_size)

    def blocks(x):  # [B n, b, H, D]
        return x.reshape(B * n, block_size, H, x.shape[-1])

    def beside(x):
        x = jnp.where(real[..., None, None], x.reshape(B, n, block_size, H, -1), 0)
        return blocks(jnp.einsum("bhim,bmthd->bithd", sort.astype(x.dtype), x))

    is_there = jnp.any(allowed[:, :, :, None] & real[:, None], axis=2)
    offsets = jnp.arange(block_size, dtype=jnp.int32)
    out = attend(
        blocks(q),
        jnp.concatenate([beside(k), blocks(k)], axis=1),
        jnp.concatenate([beside(v), blocks(v)], axis=1),
        mask=masks.Causal() if causal else masks.Full(),
        q_positions=offsets,
        kv_positions=jnp.concatenate([jnp.full_like(offsets, -1), offsets]),
        segment_ids=(
            jnp.zeros((B * n, block_size), jnp.int32),
            jnp.where(jnp.concatenate([is_there, real], axis=2), 0, NOBODY).reshape(B * n, 2 * block_size),
        ),
        dropout=dropout,
        implementation=implementation,
    )
    return out.reshape(B, L, H, -1)


class Sinkhorn(ContentAttention):
    """Attention to the own block and to a sorted one; a small network ranks blocks, Sinkhorn balancing makes that a permutation.

    block_size: b, tokens of a block.
    max_length: positions that the sorting network has outputs for. Longer inputs are an error.
    iterations: of balancing (`sinkhorn`); 5 to 10 in the paper.
    temperature: tau; scores are divided by it before balancing, with Gumbel noise while training (section 3.1.2).

    A block is described by the mean of its tokens; where causal, by that of all tokens up to its first one (the paper adds them
    up instead, section 3.3.1). Padding takes no part in any of it. The paper's variant SortCut is left out. In the causal form a
    token never reads a later one. A causal layer decodes by computing the row anew (`decode_anew`).
    """

    block_size: int = 64
    max_length: int = 1024
    iterations: int = 8
    temperature: float = 0.75

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        return decode_anew(self, x, ctx, self._whole) if ctx.decode else self._whole(x, ctx)

    def _whole(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        (B, L, E), b = x.shape, self.block_size
        self.check(ctx, block_size=b, iterations=self.iterations)
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
        if self.max_length < L:
            raise ValueError(f"sinkhorn: a sequence of {L} positions is longer than max_length={self.max_length}")
        if not self.temperature > 0:
            raise ConfigError(f"sinkhorn: temperature={self.temperature} must be more than 0")
        mask = jnp.ones((B, L), bool) if ctx.mask is None else ctx.mask
        x, mask = jnp.pad(x, ((0, 0), (0, -L % b), (0, 0))), jnp.pad(mask, ((0, 0), (0, -L % b)))
        allowed = allowed_blocks(mask, b, causal=self.causal)
        out = sinkhorn_attention(
            *(self.project(x, name) for name in ("query", "key", "value")),
            sinkhorn(self._scores(x, mask, ctx), allowed, self.iterations, causal=self.causal),
            allowed,
            mask,
            block_size=b,
            causal=self.causal,
            dropout=self.weights_dropout(ctx),
            implementation=self.implementation,
        )
        return self.output(out, E)[:, :L]

    def _scores(self, x, mask, ctx: Context) -> Float[Array, "B H n n"]:
        """How much block i wants block j (eq. 1, and section 3.1.2 for the noise)."""
        blocks = -(-self.max_length // self.block_size)
        hidden = nn.relu(self._dense(x.shape[-1], "sort_hidden")(self._blocks(x, mask)))
        scores = self._dense((self.num_heads, blocks), "sort")(hidden)[..., : hidden.shape[1]]
        scores = jnp.moveaxis(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), 2, 1)
        if ctx.train:
            scores = scores + jax.random.gumbel(self.make_rng("dropout"), scores.shape, scores.dtype)
        return scores / self.temperature

    def _blocks(self, x, mask) -> Float[Array, "B n E"]:
        """The vector that describes each block."""
        real = mask[..., None].astype(x.dtype)
        if self.causal:
            sums, counts = (jnp.cumsum(y, axis=1)[:, :: self.block_size] for y in (x * real, real))
        else:
            sums, counts = (jnp.sum(y.reshape(len(x), -1, self.block_size, y.shape[-1]), axis=2) for y in (x * real, real))
        return sums / jnp.maximum(counts, 1)
