"""Permutation language modelling with two-stream self-attention (XLNet; Yang et al. 2019, arXiv 1906.08237, section 2.3).

Tokens are predicted in a random order, each from those that come before it in that order and from where it stands itself. So a
position has two states: its content h, which has seen its own token, and, where it is to be predicted, a query g, which has not.
Both run through the same layers, here as one row of L + n positions: keys and values come from the contents alone, and what a
query sees is causal attention in the order of prediction, its positions being those of the text.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import Context
from efficient_attn.models.feed_forward import FeedForward
from efficient_attn.positions import Places
from kernels.attention import masks


def draw_order(key: jax.Array, batch: int, length: int, num_targets: int) -> tuple[Int[Array, "B L"], Int[Array, "B n"]]:
    """When each position is predicted, a uniform permutation for each row, and the positions of the last `num_targets`.

    Published: a sixth of the tokens are targets (section 2.3, "Partial Prediction": K = 6).
    """
    order = jax.vmap(lambda key: jax.random.permutation(key, length))(jax.random.split(key, batch))
    return jnp.argsort(order, axis=1).astype(jnp.int32), order[:, length - num_targets :].astype(jnp.int32)


class TwoStreamAttention(Attention):
    """Attention of contents and queries to contents; arguments are those of `Attention`."""

    bias: FrozenDict = FrozenDict(name="transformer_xl")
    use_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B both E"],
        rank: Int[Array, "B L"],
        targets: Int[Array, "B n"],
        mask: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B both E"]:
        """x: contents of L positions, then queries of n targets. rank: when each position is predicted. mask: real ones."""
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        B, L = rank.shape
        contents = x[:, :L]
        q = self._dense((heads, head_dim), "query")(x)
        k = self._dense((kv_heads, head_dim), "key")(contents)
        v = self._dense((kv_heads, head_dim), "value")(contents)
        own_rank = jnp.take_along_axis(rank, targets, axis=1)
        options = dict(q_positions=jnp.concatenate([rank, own_rank - 1], axis=1), kv_positions=rank)  # a query not its token
        if mask is not None:
            options["segment_ids"] = (jnp.ones(x.shape[:2], jnp.int32), mask.astype(jnp.int32))
        at = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
        at_queries, extent = jnp.concatenate([at, targets], axis=1), jnp.full((1, 1), L, jnp.int32)
        places = Places(at_queries, at, extent, extent, at_queries, causal=False, aligned=False)
        methods = self._position_methods(x.shape[-1], Context())
        out = self._attend(methods, places, q, k, v, mask=masks.Causal(), **options)
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)


class PermutationLM(nn.Module):
    """Scores of the tokens at the target positions.

    depth, width, num_heads, head_dim: layers, E, H, and D (None: E / H). feed_forward_width: of the networks' hidden layer.
    norm_epsilon: of the layer norms, which come after each layer as published.
    """

    vocab_size: int
    depth: int
    width: int
    num_heads: int
    feed_forward_width: int
    head_dim: int | None = None
    norm_epsilon: float = 1e-12
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "B L"],
        rank: Int[Array, "B L"],
        targets: Int[Array, "B n"],
        mask: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B n V"]:
        """inputs: all tokens. rank, targets: see `draw_order`. mask: True where a token is real."""
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype, name="embed")
        start = self.param("query", nn.initializers.normal(0.02), (self.width,), jnp.float32).astype(self.dtype)
        queries = jnp.broadcast_to(start, (*targets.shape, self.width))
        x = jnp.concatenate([embed(inputs), queries], axis=1)
        for i in range(self.depth):
            attention = TwoStreamAttention(self.num_heads, head_dim=self.head_dim, dtype=self.dtype, name=f"layer_{i}_mixer")
            x = self._norm(f"layer_{i}_norm_mixer")(x + attention(x, rank, targets, mask))
            network = FeedForward(self.feed_forward_width, dtype=self.dtype, name=f"layer_{i}_mlp")
            x = self._norm(f"layer_{i}_norm_mlp")(x + network(x, Context()))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32)
        return embed.attend(x[:, inputs.shape[1] :]).astype(jnp.float32) + bias[None, None]

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name=name)
