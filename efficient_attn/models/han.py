"""Hierarchical attention network: tokens to sentences, sentences to a document (Yang et al. 2016, NAACL, "HAN")."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context


class AttentionPooling(nn.Module):
    """sum_t alpha_t h_t, alpha = softmax(u_t . u_w) over real tokens, u_t = tanh(W h_t + b) (section 2.2); 0 where none is."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, "B E"]:
        u = nn.tanh(nn.Dense(h.shape[-1], dtype=self.dtype, name="hidden")(h))
        context = self.param("context", nn.initializers.normal(0.1), (h.shape[-1],), jnp.float32)
        scores = jnp.einsum("bte,e->bt", u.astype(jnp.float32), context)
        is_empty = ~jnp.any(mask, axis=1, keepdims=True)
        alpha = jax.nn.softmax(jnp.where(mask | is_empty, scores, -jnp.inf), axis=1)
        return jnp.einsum("bt,bte->be", jnp.where(mask, alpha, 0).astype(h.dtype), h)


class Level(nn.Module):
    """A bidirectional GRU over T steps, and attention over its states: [B, T, E] to [B, 2 hidden]. Padding is at the end."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], mask: Bool[Array, "B T"]) -> Float[Array, "B E2"]:
        forward, backward = (
            nn.RNN(nn.GRUCell(self.hidden, dtype=self.dtype, name=name), name=f"{name}_rnn") for name in ("forward", "backward")
        )
        h = nn.Bidirectional(forward, backward, name="gru")(x, seq_lengths=mask.sum(axis=1))
        return AttentionPooling(dtype=self.dtype, name="attention")(h, mask)


class HAN(nn.Module):
    """Class scores of a document of tokens (section 2.2): a `Level` over each sentence, and one over what these make of them.

    width: of token vectors, 200 in the paper. hidden: of each GRU, 50. sentence_length: tokens of a sentence; the paper has
    sentences and words, here, where tokens are bytes, sentences are blocks of so many. dropout: after the embedding and before
    the classifier. embed_stddev, dtype: as in `Trunk`.

    Padding stands at the end of a row. The task fills in `vocab_size`, `num_outputs` and `length`.
    """

    vocab_size: int | None
    num_outputs: int
    length: int
    width: int = 200
    hidden: int = 50
    sentence_length: int = 64
    embed_stddev: float = 0.1
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Int[Array, "B L"], ctx: Context) -> Float[Array, "B C"]:
        self._check(ctx)
        size, batch = self.sentence_length, inputs.shape[0]
        mask = jnp.ones(inputs.shape, bool) if ctx.mask is None else ctx.mask
        init = nn.initializers.normal(self.embed_stddev)
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="embed")(inputs)
        x = nn.Dropout(self.dropout)(x, deterministic=not ctx.train)
        ends = (0, -inputs.shape[1] % size)
        tokens = jnp.pad(x, ((0, 0), ends, (0, 0))).reshape(-1, size, self.width)
        is_token = jnp.pad(mask, ((0, 0), ends)).reshape(-1, size)
        sentences = Level(self.hidden, dtype=self.dtype, name="words")(tokens, is_token).reshape(batch, -1, 2 * self.hidden)
        is_sentence = jnp.any(is_token, axis=1).reshape(batch, -1)
        document = Level(self.hidden, dtype=self.dtype, name="sentences")(sentences, is_sentence)
        document = nn.Dropout(self.dropout)(document, deterministic=not ctx.train)
        return nn.Dense(self.num_outputs, dtype=jnp.float32, name="head")(document)

    def _check(self, ctx: Context) -> None:
        for name in ("width", "hidden", "sentence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.vocab_size is None:
            raise ConfigError("model.architecture='han' reads tokens: choose a task with a vocabulary (task.as_tokens=True)")
        if ctx.segment_ids is not None:
            raise ValueError("HAN makes one vector of a row: it takes no packed documents (segment_ids)")
