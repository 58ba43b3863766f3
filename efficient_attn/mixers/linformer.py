"""Linformer: softmax attention over keys and values projected along the sequence (Wang et al. 2020, arXiv 2006.04768)."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.blocks import in_blocks
from efficient_attn.mixers.context import Context
from kernels.attention import Dropout, attend

REFUSES_DOCUMENTS = "linformer projects whole rows: it takes no segment_ids; give each document a row of its own"


class Linformer(Attention):
    """softmax(Q (E K)^T / sqrt(D)) (F V), where E and F make k positions of up to n (eq. 7). Bidirectional only.

    max_length: n. Shorter sequences use the first columns of E and F, longer ones are an error.
    projected_length: k. Layers may differ in it, by a tuple of mixer dicts.
    projection: "learned", E and F [k, n], from N(0, 1/k); or, over blocks of n / k positions (rounded up), "mean", "max", or
        "convolution", whose kernel and stride are the block, with weights for each channel (section 4, "general projections").
    sharing: of what is learned: "none", each head has its own E and F; "headwise", all heads of a layer share both; "key-value",
        and E = F; "layerwise", and all layers that say so share it, within a model.

    Masked positions enter projections as 0 and pooling not at all; blocks without a real position are not attended. The other
    fields are those of `Attention`; position biases do not go with positions that are mixtures.
    """

    max_length: int = 1024
    projected_length: int = 256
    projection: str = "learned"
    sharing: str = "headwise"

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self._check(x.shape[1], ctx)
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        positions = ctx.positions_or_default(*x.shape[:2])
        q = self._rotate(self._dense((heads, head_dim), "query")(x), positions)
        k = self._rotate(self._dense((kv_heads, head_dim), "key")(x), positions)
        v = self._dense((kv_heads, head_dim), "value")(x)
        mask = jnp.ones(x.shape[:2], bool) if ctx.mask is None else ctx.mask
        k, v, is_seen = self._projected(k, v, mask, ctx)
        out = attend(
            q, k, v,
            segment_ids=(jnp.ones(x.shape[:2], jnp.int32), is_seen.astype(jnp.int32)),
            scale=self.scale,
            dropout=Dropout(self.dropout, self.make_rng("dropout")) if ctx.train and self.dropout else None,
            implementation=self.implementation,
        )  # fmt: skip
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)

    def _check(self, length: int, ctx: Context) -> None:
        if self.causal or ctx.decode:
            raise ConfigError("linformer: a projection mixes earlier and later positions; it has no causal form and no decoding")
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
        if ctx.bias is not None:
            raise ConfigError("linformer: keys are mixtures of positions; it goes with no model.bias")
        if length > self.max_length:
            raise ValueError(f"linformer: a sequence of {length} positions is longer than max_length={self.max_length}")

    def _projected(self, k, v, mask, ctx: Context):
        """Keys and values [B, S, G, D], and which of them are there [B, S]."""
        weights_shape, project = lookup(PROJECTIONS, self.projection, "model.mixer.projection")
        block = -(-self.max_length // self.projected_length)
        weights = [None, None]
        if weights_shape is not None:
            shape = weights_shape(self.max_length, self.projected_length, k.shape[-1])
            weights = lookup(SHARINGS, self.sharing, "model.mixer.sharing")(self, shape, k.shape[2], ctx)
        (k, is_seen), (v, _) = (project(x, mask, w, block) for x, w in zip((k, v), weights, strict=True))
        return k, v, is_seen

    def shared_parameters(self) -> Mapping[str, tuple[Callable, tuple[int, ...]]]:
        """What the model keeps for all layers: initialiser and shape by name."""
        if self.sharing != "layerwise" or self.projection in ("mean", "max"):
            return {}
        if self.projection != "learned":
            raise ConfigError(f"linformer: sharing='layerwise' goes with projection='learned', not {self.projection!r}")
        return {SHARED: (self._init(), (1, self.max_length, self.projected_length))}

    def _init(self) -> Callable:
        return nn.initializers.normal(self.projected_length**-0.5)

    def weights(self, name: str, *shape: int) -> Float[Array, "..."]:
        return self.param(name, self._init(), shape, jnp.float32).astype(self.dtype)


SHARED = "linformer_projection"
"""The parameter of the model that layers share."""


def _each(mixer: Linformer, shape: tuple[int, ...], heads: int, ctx: Context) -> list:
    return [mixer.weights(name, heads, *shape) for name in ("key_projection", "value_projection")]


def _headwise(mixer: Linformer, shape: tuple[int, ...], heads: int, ctx: Context) -> list:
    return [mixer.weights(name, 1, *shape) for name in ("key_projection", "value_projection")]


def _key_value(mixer: Linformer, shape: tuple[int, ...], heads: int, ctx: Context) -> list:
    return [mixer.weights("projection", 1, *shape)] * 2


def _layerwise(mixer: Linformer, shape: tuple[int, ...], heads: int, ctx: Context) -> list:
    if SHARED not in (ctx.shared or {}):
        raise ConfigError("linformer: sharing='layerwise' is among the layers of a model; a layer alone takes 'key-value'")
    return [ctx.shared[SHARED].astype(mixer.dtype)] * 2


SHARINGS: Mapping[str, Callable] = {"none": _each, "headwise": _headwise, "key-value": _key_value, "layerwise": _layerwise}
"""(mixer, shape, heads, ctx) -> weights of keys and of values, each [heads or 1, *shape]."""

Projected = tuple[Float[Array, "B S G D"], Bool[Array, "B S"]]


def learned(x: Float[Array, "B L G D"], mask: Bool[Array, "B L"], weights: Float[Array, "#G N S"], block: int) -> Projected:
    """E x, with the first L columns of E; `weights` is its transpose, one for each head or one for all."""
    x = jnp.where(mask[..., None, None], x, 0)
    weights = weights[:, : x.shape[1]]
    out = jnp.einsum("blgd,ls->bsgd", x, weights[0]) if len(weights) == 1 else jnp.einsum("blgd,gls->bsgd", x, weights)
    return out, jnp.ones(out.shape[:2], bool)


def mean(x: Float[Array, "B L G D"], mask: Bool[Array, "B L"], weights: None, block: int) -> Projected:
    x, mask = in_blocks(x, block), in_blocks(mask, block)
    count = jnp.maximum(jnp.sum(mask, axis=2), 1).astype(x.dtype)
    return jnp.sum(jnp.where(mask[..., None, None], x, 0), axis=2) / count[..., None, None], jnp.any(mask, axis=2)


def maximum(x: Float[Array, "B L G D"], mask: Bool[Array, "B L"], weights: None, block: int) -> Projected:
    x, mask = in_blocks(x, block), in_blocks(mask, block)
    is_seen = jnp.any(mask, axis=2)
    top = jnp.max(jnp.where(mask[..., None, None], x, jnp.finfo(x.dtype).min), axis=2)
    return jnp.where(is_seen[..., None, None], top, 0), is_seen


def convolution(
    x: Float[Array, "B L G D"], mask: Bool[Array, "B L"], weights: Float[Array, "#G block D"], block: int
) -> Projected:
    x, mask = in_blocks(x, block), in_blocks(mask, block)
    weights = jnp.broadcast_to(weights, (x.shape[3], *weights.shape[1:]))
    return jnp.einsum("bsjgd,gjd->bsgd", jnp.where(mask[..., None, None], x, 0), weights), jnp.any(mask, axis=2)


PROJECTIONS: Mapping[str, tuple[Callable | None, Callable]] = {
    "learned": (lambda length, projected, head_dim: (length, projected), learned),
    "mean": (None, mean),
    "max": (None, maximum),
    "convolution": (lambda length, projected, head_dim: (-(-length // projected), head_dim), convolution),
}
"""Shape of one head's weights from n, k and D (None: there are none), and (x, mask, weights, block) -> (projected, is there)."""
