"""The residual block every model stacks: a mixer and a feed-forward network, each with its norm."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
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
    feed_forward_chunk: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        mixer, norm = mixers.build(self.mixer, name="mixer", dtype=self.dtype), self._norm("norm_mixer")
        x = self._residual(norm, mixer, x, ctx)
        if self.feed_forward_width:
            x = self._residual(self._norm("norm_mlp"), self._feed_forward(), x, ctx)
        if getattr(mixer, "remembers_output", False):
            mixer.remember(norm(x, ctx) if self.prenorm else x, ctx)
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
        if routing is None:
            return FeedForward(**network, chunk=self.feed_forward_chunk)
        return moe.MixtureOfExperts(routing, **network)

    def _residual(self, norm: Norm, layer: Callable, x, ctx: Context):
        if self.prenorm:
            return x + self._branch(norm, layer, x, ctx)
        x = x + nn.Dropout(self.dropout)(checkpoint_name(layer(x, ctx), "branch"), deterministic=not ctx.train)
        return norm(x, ctx)

    def _branch(self, norm: Norm, layer: Callable, x, ctx: Context):
        """What a layer with its norm before it adds to x."""
        y = checkpoint_name(layer(norm(x, ctx), ctx), "branch")
        return nn.Dropout(self.dropout)(y, deterministic=not ctx.train)

    def _norm(self, name: str) -> Norm:
        return lookup(NORMS, self.norm, "model.norm")(name, self.norm_momentum, self.dtype)


class ReversibleBlock(Block):
    """A block taken apart for `reversible.stack`: what its mixer or its feed-forward network ("mlp") adds."""

    halves: ClassVar[Mapping[str, tuple[str, ...]]] = {"mixer": ("norm_mixer", "mixer"), "mlp": ("norm_mlp", "mlp")}
    """The submodules of each half."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context, half: str) -> Float[Array, "B L E"]:
        if half == "mixer":
            mixer = mixers.build(self.mixer, name="mixer", dtype=self.dtype)
            return self._branch(self._norm("norm_mixer"), mixer, x, ctx)
        return self._branch(self._norm("norm_mlp"), self._feed_forward(), x, ctx)


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
    "branches": jax.checkpoint_policies.save_only_these_names("branch"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all_dots": jax.checkpoint_policies.dots_saveable,
}
"""What the backward pass keeps of a block: everything; nothing but its input; what its mixer and its network add; its weight
products; all its products, those of queries and keys too. The rest is computed again."""
