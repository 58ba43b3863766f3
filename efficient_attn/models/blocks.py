"""The residual block every model stacks: a mixer and a feed-forward network, each with its norm."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from efficient_attn import mixers
from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.models import moe
from efficient_attn.models.feed_forward import FeedForward

Norm = Callable[[Float[Array, "B L E"], Context], Float[Array, "B L E"]]


def layer_norm(name: str, momentum: float, dtype: Dtype) -> Norm:
    """Normalises each position over its channels (Ba et al. 2016)."""
    norm = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
    return lambda x, ctx: norm(x)


def rms_norm(name: str, momentum: float, dtype: Dtype) -> Norm:
    """Divides each position by its root mean square (Zhang & Sennrich 2019)."""
    norm = nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)
    return lambda x, ctx: norm(x)


def batch_norm(name: str, momentum: float, dtype: Dtype) -> Norm:
    """Normalises each channel over the real tokens of the whole batch (Ioffe & Szegedy 2015).

    Outside training the running averages, weighted by `momentum`, take the place of the batch's statistics. Padding takes
    no part in them; the released S4 and S5 code counts it.
    """
    norm = nn.BatchNorm(momentum=momentum, epsilon=1e-5, dtype=dtype, name=name)

    def apply(x, ctx):
        mask = None if ctx.mask is None else ctx.mask[..., None]
        return norm(x, use_running_average=not ctx.train, mask=mask)

    return apply


NORMS: Mapping[str, Callable[[str, float, Dtype], Norm]] = {"layer": layer_norm, "rms": rms_norm, "batch": batch_norm}
"""Norms by the name `config.model.norm` uses; all keep their statistics in float32."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ff(norm(x)); with `prenorm=False`, norm(x + mixer(x)) and norm(x + ff(x)).

    Without a feed-forward network (`feed_forward_width=0`) the block is the mixer alone, as S4 and S5 stack them. `experts`
    makes a mixture of the network: one of `moe.ROUTINGS`.
    """

    mixer: Mapping
    norm: str
    prenorm: bool
    norm_momentum: float
    feed_forward: str
    feed_forward_width: int
    use_bias: bool
    experts: Mapping
    dropout: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        mixer = mixers.build(self.mixer, name="mixer", dtype=self.dtype)
        x = self._residual("norm_mixer", mixer, x, ctx)
        if self.feed_forward_width:
            x = self._residual("norm_mlp", self._feed_forward(), x, ctx)
        return x

    def _feed_forward(self) -> nn.Module:
        network = dict(
            width=self.feed_forward_width,
            kind=self.feed_forward,
            dropout=self.dropout,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="mlp",
        )
        routing = moe.routing(self.experts)
        return FeedForward(**network) if routing is None else moe.MixtureOfExperts(routing, **network)

    def _residual(self, norm_name: str, layer: Callable, x, ctx: Context):
        norm = lookup(NORMS, self.norm, "model.norm")(norm_name, self.norm_momentum, self.dtype)
        y = layer(norm(x, ctx), ctx) if self.prenorm else layer(x, ctx)
        x = x + nn.Dropout(self.dropout)(y, deterministic=not ctx.train)
        return x if self.prenorm else norm(x, ctx)


def masked_mean(x: Float[Array, "B L E"], mask: Bool[Array, "B L"]) -> Float[Array, "B E"]:
    """Mean over real positions; zero where a row has none."""
    weights = mask.astype(jnp.float32)[..., None]
    return (jnp.sum(x * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)).astype(x.dtype)


def first(x: Float[Array, "B L E"], mask: Bool[Array, "B L"]) -> Float[Array, "B E"]:
    """The first position: where the CLS token stands."""
    return x[:, 0]


def last(x: Float[Array, "B L E"], mask: Bool[Array, "B L"]) -> Float[Array, "B E"]:
    """The last real position of each row."""
    index = jnp.max(jnp.where(mask, jnp.arange(x.shape[1])[None, :], 0), axis=1)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


POOLINGS: Mapping[str, Callable] = {"mean": masked_mean, "cls": first, "last": last}


REMAT_POLICIES: Mapping[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What the backward pass keeps of a block: everything, nothing but its input, or its weight products."""
