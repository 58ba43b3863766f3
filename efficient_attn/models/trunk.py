"""What all models share: inputs to vectors, then a stack of blocks."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Float

from efficient_attn.arguments import ConfigError, check_arguments, lookup
from efficient_attn.mixers.context import Context
from efficient_attn.models.blocks import NORMS, REMAT_POLICIES, Block
from efficient_attn.positions import EMBEDDINGS


class Trunk(nn.Module):
    """Fields common to every model; `config.model` is exactly these and the head's own.

    mixer: one mixer dict, or several that are cycled over depth (a hybrid).
    depth, width: blocks, and channels E.
    norm, prenorm, norm_momentum: one of `NORMS`, before or after each layer; momentum of batch-norm averages.
    feed_forward, feed_forward_width: one of `FEED_FORWARDS` and its hidden size; width 0 leaves it out.
    final_norm: one more norm after the last block.
    embed_stddev: standard deviation of initial token vectors.
    positions: added to embeddings, by name from `positions.EMBEDDINGS`.
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
    positions: Mapping = FrozenDict(name="none")
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

    def add_positions(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        positions = ctx.positions_or_default(*x.shape[:2])
        x = x + self._position_embedding()(positions, self.length, self.width).astype(self.dtype)
        return nn.Dropout(self.embed_dropout)(x, deterministic=not ctx.train)

    def blocks(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        """The stack of blocks, and the norm that closes it."""
        policy = lookup(REMAT_POLICIES, self.remat, "model.remat")
        block = Block if policy is None else nn.remat(Block, policy=policy)
        shared = {field: getattr(self, field) for field in _BLOCK_FIELDS}
        for i, mixer in enumerate(mixers_by_depth(self.mixer, self.depth)):
            x = block(mixer=mixer, name=f"layer_{i}", **shared)(x, ctx)
        if self.final_norm:
            x = lookup(NORMS, self.norm, "model.norm")("norm", self.norm_momentum, self.dtype)(x, ctx)
        return x

    def _position_embedding(self) -> nn.Module:
        arguments = dict(self.positions)
        constructor = lookup(EMBEDDINGS, arguments.pop("name", None), "model.positions.name")
        check_arguments(constructor, arguments, f"model.positions (name={self.positions['name']!r})")
        return constructor(**arguments, name="positions")


_BLOCK_FIELDS = (
    "norm", "prenorm", "norm_momentum", "feed_forward", "feed_forward_width", "dropout", "dtype",
)  # fmt: skip


def mixers_by_depth(mixer: Mapping | Sequence[Mapping], depth: int) -> list[Mapping]:
    """One mixer dict for each layer: the given ones, cycled."""
    cycle = [mixer] if isinstance(mixer, Mapping) else list(mixer)
    if not cycle or not all(isinstance(m, Mapping) for m in cycle):
        raise ConfigError(f"model.mixer must be a dict(name=...) or a tuple of such dicts, got {mixer!r}")
    return [cycle[i % len(cycle)] for i in range(depth)]
