"""Encoders that answer one question about a sequence, or about a pair of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.models.blocks import POOLINGS
from efficient_attn.models.trunk import Trunk


class Encoder(Trunk):
    """A trunk whose hidden states are pooled into one vector.

    pooling: one of `POOLINGS`. With "cls" a learned vector is put before the sequence, and its hidden state is read.
    """

    pooling: str = "mean"

    def summarise(self, inputs: Num[Array, "B *S"], ctx: Context) -> Float[Array, "B E"]:
        x = self.input_layer()(inputs)
        ctx = self.sample_positions(x, ctx)
        x = self.add_positions(x, ctx)
        mask = ctx.mask
        if self.pooling == "cls":
            if ctx.segment_ids is not None or ctx.positions is not None:
                raise ValueError("pooling='cls' puts a vector before the sequence: it takes no segment_ids and no positions")
            cls = self.param("cls", nn.initializers.normal(0.02), (1, 1, self.width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)), x], axis=1)
            mask = None if mask is None else jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)
        hidden = self.blocks(x, ctx.replace(mask=mask))
        real = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        return lookup(POOLINGS, self.pooling, "model.pooling")(hidden, real)


class Classifier(Encoder):
    """Class scores of one sequence (LRA's single-tower tasks)."""

    @nn.compact
    def __call__(self, inputs: Num[Array, "B *S"], ctx: Context) -> Float[Array, "B C"]:
        return nn.Dense(self.num_outputs, use_bias=self.use_bias, dtype=jnp.float32, name="head")(self.summarise(inputs, ctx))


class Matcher(Encoder):
    """Class scores of a pair of documents, encoded apart by the same trunk (LRA's Retrieval, Tay et al. 2020).

    A two-layer ReLU network reads [x1, x2, x1 * x2, x1 - x2]; its hidden layer has E units.
    """

    @nn.compact
    def __call__(self, inputs: Num[Array, "B 2 *S"], ctx: Context) -> Float[Array, "B C"]:
        batch = inputs.shape[0]
        towers = jax.tree.map(lambda x: x.reshape(2 * batch, *x.shape[2:]), ctx)
        summaries = self.summarise(inputs.reshape(2 * batch, *inputs.shape[2:]), towers)
        first, second = jnp.unstack(summaries.reshape(batch, 2, -1), axis=1)
        features = jnp.concatenate([first, second, first * second, first - second], axis=-1)
        hidden = nn.relu(nn.Dense(self.width, use_bias=self.use_bias, dtype=jnp.float32, name="match")(features))
        return nn.Dense(self.num_outputs, use_bias=self.use_bias, dtype=jnp.float32, name="head")(hidden)
