"""What all models share: inputs to vectors, then a stack of blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float

from efficient_attn import mixers, positions
from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.context import Context
from efficient_attn.models import reversible
from efficient_attn.models.blocks import NORMS, REMAT_POLICIES, Block, ReversibleBlock
from kernels import mesh


class Trunk(nn.Module):
    """Fields common to every model; `config.model` is exactly these and the head's own.

    mixer: one mixer dict, or several that are cycled over depth (a hybrid).
    depth, width: blocks, and channels E.
    norm, prenorm, norm_momentum: one of `NORMS`, before or after each layer; momentum of batch-norm averages.
    feed_forward, feed_forward_width: one of `FEED_FORWARDS` and its hidden size; width 0 leaves it out.
    feed_forward_chunk: positions whose feed-forward network is computed at a time, to bound its memory; 0 for all at once.
    experts: one dict of `moe.ROUTINGS`, or several that are cycled over depth: which layers have a mixture of such networks.
    use_bias: biases in feed-forward networks and in the output layer.
    residual: one of `RESIDUALS`: "standard", or "reversible" with two streams whose activations are not kept.
    final_norm: one more norm after the last block.
    embed_stddev: standard deviation of initial token vectors.
    positions: added to embeddings, by name from `positions.EMBEDDINGS`.
    bias: a position bias that all attention layers share, by name from `positions.BIASES`; their own is `mixer.bias`.
    position_sampling: which positions the whole model sees while training, by name from `positions.SAMPLINGS`.
    dropout, embed_dropout: rates after each layer and after the embedding.
    remat: one of `REMAT_POLICIES`.
    dtype: what activations are computed in; parameters and statistics stay float32.

    The task fills in `vocab_size` (None: real-valued inputs), `num_outputs` and `length`.
    """

    vocab_size: int | None
    num_outputs: int
    length: int
    mixer: Mapping | Sequence[Mapping]
    depth: int = 4
    width: int = 128
    norm: str = "layer"
    prenorm: bool = True
    norm_momentum: float = 0.9
    feed_forward: str = "gelu"
    feed_forward_width: int = 0
    feed_forward_chunk: int = 0
    experts: Mapping | Sequence[Mapping] = FrozenDict(name="none")
    use_bias: bool = True
    positions: Mapping = FrozenDict(name="none")
    bias: Mapping = FrozenDict(name="none")
    position_sampling: Mapping = FrozenDict(name="none")
    residual: str = "standard"
    final_norm: bool = True
    embed_stddev: float = 0.02
    dropout: float = 0.0
    embed_dropout: float = 0.0
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def input_layer(self) -> nn.Module:
        """Vectors of tokens, or a linear map of real-valued channels."""
        if self.vocab_size is None:
            return nn.Dense(self.width, dtype=self.dtype, name="embed")
        init = nn.initializers.normal(self.embed_stddev)
        return nn.Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="embed")

    def sample_positions(self, x: Float[Array, "B L E"], ctx: Context) -> Context:
        """The context with the positions that a model in training is to see; otherwise as it is."""
        if not ctx.train or self.position_sampling["name"] == "none":
            return ctx
        return ctx.replace(positions=self._sampling()(self.make_rng("dropout"), ctx.positions_or_default(*x.shape[:2])))

    def add_positions(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        embedding = self._position_embedding("positions")
        if not embedding.per_layer:
            x = self._with_positions(embedding, x, ctx)
        return laid_out(nn.Dropout(self.embed_dropout)(x, deterministic=not ctx.train))

    def blocks(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        """The stack of blocks, and the norm that closes it."""
        ctx = ctx.replace(bias=self._shared_bias(), shared=self._shared_parameters())
        x = lookup(RESIDUALS, self.residual, "model.residual")(self, x, ctx)
        if self.final_norm:
            x = lookup(NORMS, self.norm, "model.norm")("norm", self.norm_momentum, self.dtype)(x, ctx)
        return x

    def _standard(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        policy = lookup(REMAT_POLICIES, self.remat, "model.remat")
        for i, layer in enumerate(self._layers(Block if policy is None else nn.remat(Block, policy=policy))):
            embedding = self._position_embedding(f"positions_{i}")
            if embedding.per_layer:
                x = self._with_positions(embedding, x, ctx)
            x = laid_out(layer(x, ctx))
        return x

    def _reversible(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if ctx.shared:
            raise ConfigError(
                f"model.residual='reversible' gives each layer its own gradients; {', '.join(ctx.shared)} is shared"
            )
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return reversible.stack(self._layers(ReversibleBlock), x, ctx, key)

    def _layers(self, block: type[nn.Module]) -> list[nn.Module]:
        shared = {field: getattr(self, field) for field in _BLOCK_FIELDS}
        dicts = zip(mixers_by_depth(self.mixer, self.depth), by_depth(self.experts, self.depth, "model.experts"))
        return [block(mixer=mixer, experts=experts, name=f"layer_{i}", **shared) for i, (mixer, experts) in enumerate(dicts)]

    def _with_positions(self, embedding: nn.Module, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        at = ctx.positions_or_default(*x.shape[:2])
        return x + embedding(at, self._sampling().reach(self.length), self.width).astype(self.dtype)

    def _position_embedding(self, name: str) -> nn.Module:
        return positions.build(positions.EMBEDDINGS, self.positions, "model.positions", name=name)

    def _sampling(self):
        return positions.build(positions.SAMPLINGS, self.position_sampling, "model.position_sampling")

    def _shared_bias(self) -> Any:
        """The position method that all layers share, built for the one size of their heads."""
        bias = positions.build(positions.BIASES, self.bias, "model.bias", name="position_bias")
        if self.bias["name"] == "none":
            return None
        attention = [mixers.build(mixer, parent=None) for mixer in mixers_by_depth(self.mixer, self.depth)]
        sizes = {mixer.position_sizes(self.width) for mixer in attention if isinstance(mixer, mixers.Attention)}
        if len(sizes) != 1:
            raise ConfigError(f"model.bias is shared by attention layers of one size; here these have {sorted(map(str, sizes))}")
        return bias(*sizes)

    def _shared_parameters(self) -> Mapping[str, Array] | None:
        """Parameters that several layers use: what the mixers that have a method `shared_parameters` ask for."""
        wanted: dict[str, tuple[Callable, tuple[int, ...]]] = {}
        for mixer in mixers_by_depth(self.mixer, self.depth):
            asks = getattr(mixers.build(mixer, parent=None), "shared_parameters", dict)
            for name, (init, shape) in asks().items():
                _, agreed = wanted.setdefault(name, (init, shape))
                if shape != agreed:
                    raise ConfigError(f"model.mixer: layers that share {name} need it in one shape; here {agreed} and {shape}")
        return {name: self.param(name, init, shape, jnp.float32) for name, (init, shape) in wanted.items()} or None


RESIDUALS: Mapping[str, Callable] = {"standard": Trunk._standard, "reversible": Trunk._reversible}
"""How layers are stacked, by the name `config.model.residual` uses."""


_BLOCK_FIELDS = (
    "norm", "prenorm", "norm_momentum", "feed_forward", "feed_forward_width", "feed_forward_chunk", "use_bias", "dropout",
    "dtype",
)  # fmt: skip


def laid_out(x: Float[Array, "B L E"]) -> Float[Array, "B L E"]:
    """`x` with its rows and positions over the mesh, so that the partitioner brings weights to activations, not the reverse."""
    return mesh.constrain(x, mesh.ROWS, mesh.SEQ, None)


def mixers_by_depth(mixer: Mapping | Sequence[Mapping], depth: int) -> list[Mapping]:
    """One mixer dict for each layer: the given ones, cycled."""
    return by_depth(mixer, depth, "model.mixer")


def by_depth(dicts: Mapping | Sequence[Mapping], depth: int, field: str) -> list[Mapping]:
    """One dict for each layer: the given ones, cycled. `field` is what errors call them."""
    cycle = [dicts] if isinstance(dicts, Mapping) else list(dicts)
    if not cycle or not all(isinstance(d, Mapping) for d in cycle):
        raise ConfigError(f"{field} must be a dict(name=...) or a tuple of such dicts, got {dicts!r}")
    return [cycle[i % len(cycle)] for i in range(depth)]
