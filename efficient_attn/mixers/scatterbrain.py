"""Scatterbrain: exact attention on a sparse support, random features elsewhere (Chen et al. 2021, arXiv 2110.15343)."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.anew import decode_anew
from efficient_attn.mixers.blocks import in_blocks
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.performer import Performer, Projection, positive_features, softmax_exponents
from efficient_attn.mixers.smyrf import asymmetric, clusters
from kernels.attention import attend, masks, merge

REFUSES_DOCUMENTS = "scatterbrain sums random features over blocks of the row: it takes no segment_ids; give each document a row"


def scatterbrain(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H P"],
    projection: Projection | None,
    *,
    block_size: int,
    look_back: int = 1,
    look_ahead: int = 1,
    causal: bool = False,
    mask: Bool[Array, "B L"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H P"]:
    """Rows of A_ij = exp(q_i . k_j / sqrt(D)) on the support and phi(q_i) . phi(k_j) elsewhere, divided by their sums, times v.

    This is phi(Q) phi(K)^T + S with the sparse S of equation 2, computed without its differences: exact attention over the
    support and a sum of features over the rest are merged by their log-sum-exps. Unbiased before the division.

    The support is in blocks of positions: a token's own, `look_back` before it and `look_ahead` after it. Bidirectional, 0 and -1
    leave none; the causal form ignores `look_ahead` and always has a token's own block.
    Sums of features over what lies before and after these blocks come from sums over whole ones, [L / block_size, H, P + 1, M].

    mask: False at keys that nothing reads. projection: of `positive_features`. implementation: of `kernels.attention.attend`.
    """
    if causal and look_back < 0:
        raise ValueError(f"scatterbrain: look_back={look_back} with causal=True; at least 0, the own block, is needed")
    parts = [_far(q, k, v, projection, block_size, look_back, -1 if causal else look_ahead, causal, mask)]
    if causal or look_back + look_ahead >= 0:
        near = masks.BlockLocal(block_size, look_back, 0 if causal else look_ahead)
        near = masks.Causal() & near if causal else near
        groups = None if mask is None else mask.astype(jnp.int32)
        parts.append(attend(q, k, v, mask=near, segment_ids=groups, return_lse=True, implementation=implementation))
    return merge(parts)[0].astype(v.dtype)


def _far(q, k, v, projection, block_size: int, look_back: int, look_ahead: int, causal: bool, mask):
    """The (out, lse) of estimated attention to the blocks more than `look_back` before and, if not causal, `look_ahead` after."""
    exponents = softmax_exponents(q, projection)
    shift = jax.lax.stop_gradient(exponents.max(axis=-1, keepdims=True))
    phi_q = positive_features(exponents, shift)
    phi_k = softmax_exponents(k, projection)
    phi_k = positive_features(phi_k, jnp.zeros_like(phi_k[..., :1]))
    phi_k = phi_k if mask is None else jnp.where(mask[..., None, None], phi_k, 0)
    values = jnp.concatenate([v.astype(phi_k.dtype), jnp.ones_like(v[..., :1], dtype=phi_k.dtype)], axis=-1)
    phi_q, phi_k, values = (in_blocks(x, block_size) for x in (phi_q, phi_k, values))
    of_block = jnp.einsum("bnihp,bnihm->bnhpm", values, phi_k)
    sums = _before(of_block, look_back)
    if not causal:
        sums = sums + jnp.flip(_before(jnp.flip(of_block, axis=1), look_ahead), axis=1)
    sums = jnp.einsum("bnihm,bnhpm->bnihp", phi_q, sums)
    sums = sums.reshape(sums.shape[0], -1, *sums.shape[3:])[:, : q.shape[1]]
    total, shift = sums[..., -1], shift[..., 0]
    is_empty = total <= 0
    safe = jnp.where(is_empty, 1, total)
    return sums[..., :-1] / safe[..., None], jnp.where(is_empty, -jnp.inf, shift + jnp.log(safe))


def _before(x: Float[Array, "B n H P M"], nearest: int) -> Float[Array, "B n H P M"]:
    """At block i, the sum over blocks before i - nearest."""
    skipped = nearest + 1
    sums = jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (skipped, 0), *((0, 0),) * 3))
    return sums[:, : x.shape[1]]


def in_order(x: Float[Array, "B L H D"], order: Int[Array, "B H L"]) -> Float[Array, "B L H D"]:
    """The tokens of each head in an order of its own."""
    return jnp.take_along_axis(x, jnp.moveaxis(order, 1, 2)[..., None], axis=1)


class Scatterbrain(Performer):
    """Attention that is exact on a sparse support and estimated elsewhere (`scatterbrain`).

    num_heads, head_dim, causal, use_bias, num_features, orthogonal, redraw_every: as in `Performer`; its kernel is "softmax".
    support: one of `SUPPORTS`: "local", or "lsh": queries and keys sorted by `smyrf`'s asymmetric hash, one round of it, so that
        what is near is likely to weigh much. Bidirectional only. New directions are drawn at every step of training.
    block_size, look_back, look_ahead: the blocks of positions, or of places in the sorted order, that a token sees; nothing is
        looked ahead of a token where causal.
    seed: of the hash outside training.
    implementation: of `kernels.attention.attend`.

    A causal layer decodes by computing the row anew (`decode_anew`).
    """

    support: str = "local"
    block_size: int = 64
    look_back: int = 1
    look_ahead: int = 1
    seed: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        whole = super().__call__
        return decode_anew(self, x, ctx, whole) if ctx.decode else whole(x, ctx)

    def attention(self, q, k, v, x, ctx: Context) -> Float[Array, "B L H P"]:
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
        if self.kernel != "softmax":
            raise ConfigError(f"scatterbrain: kernel={self.kernel!r} does not estimate the softmax; use 'softmax'")
        return lookup(SUPPORTS, self.support, "model.mixer.support")(self, q, k, v, ctx)

    def local(self, q, k, v, ctx: Context) -> Float[Array, "B L H P"]:
        """The support in blocks of the order that tokens have here."""
        options = dict(block_size=self.block_size, look_back=self.look_back, look_ahead=self.look_ahead, causal=self.causal)
        projection = self.projection(q.shape[-1], ctx)
        return scatterbrain(q, k, v, projection, mask=ctx.mask, implementation=self.implementation, **options)

    def sorted(self, q, k, v, ctx: Context) -> Float[Array, "B L H P"]:
        """The support in blocks of queries and of keys, each sorted by its hash, padding last."""
        if self.causal:
            raise ConfigError("scatterbrain: support='lsh' sorts later tokens among earlier ones; where causal, use 'local'")
        mask = jnp.ones(q.shape[:2], bool) if ctx.mask is None else ctx.mask
        key = self.make_rng("dropout") if ctx.train else jax.random.key(self.seed)
        directions = jax.random.normal(key, (self.num_heads, q.shape[-1] + 2, 1))
        hashed = asymmetric(*jax.lax.stop_gradient((q, k)), mask)
        q_order, k_order = (clusters(x, directions, mask)[:, :, 0] for x in hashed)
        is_real = jnp.arange(q.shape[1])[None] < jnp.sum(mask, axis=1, keepdims=True)
        out = self.local(in_order(q, q_order), in_order(k, k_order), in_order(v, k_order), ctx.replace(mask=is_real))
        return in_order(out, jnp.argsort(q_order, axis=-1).astype(jnp.int32))


SUPPORTS: Mapping[str, Callable] = {"local": Scatterbrain.local, "lsh": Scatterbrain.sorted}
"""(mixer, q, k, v, ctx) -> output of the heads."""
