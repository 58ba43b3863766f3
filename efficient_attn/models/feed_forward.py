"""The feed-forward network of a block: what happens to each position by itself."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from kernels.matmul import dot_general


def _glu(activation: Callable) -> Callable:
    """A gated linear unit (Shazeer 2020): `activation` of one projection times another."""

    def hidden(x, width, dense):
        return activation(dense(width, "gate")(x)) * dense(width, "up")(x)

    return hidden


def _plain(activation: Callable) -> Callable:
    def hidden(x, width, dense):
        return activation(dense(width, "up")(x))

    return hidden


FEED_FORWARDS: Mapping[str, Callable] = {
    "gelu": _plain(nn.gelu),
    "relu": _plain(nn.relu),
    "silu": _plain(nn.silu),
    "glu": _glu(nn.sigmoid),
    "geglu": _glu(nn.gelu),
    "swiglu": _glu(nn.silu),
    "reglu": _glu(nn.relu),
}
"""The hidden layer of a feed-forward network, by the name `config.model.feed_forward` uses.

A function of x, the width, and `dense(width, name)`, which makes a linear layer.
"""


class FeedForward(nn.Module):
    """Two linear layers with one of `FEED_FORWARDS` between them.

    chunk: positions that are computed at a time, so that the hidden layer of all of them never exists, forward or backward
        (Reformer, Kitaev et al. 2020, section 3); 0 for all at once.
    """

    width: int
    kind: str = "gelu"
    dropout: float = 0.0
    use_bias: bool = True
    chunk: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if not self.chunk or self.chunk >= x.shape[1]:
            return self._network(x, ctx)
        B, L, E = x.shape
        chunks = jnp.pad(x, ((0, 0), (0, -L % self.chunk), (0, 0))).reshape(B, -1, self.chunk, E)

        def one(module, carry, chunk):
            return carry, module._network(chunk, ctx)

        over_chunks = nn.scan(
            nn.remat(one, prevent_cse=False),
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=1,
            out_axes=1,
        )
        return over_chunks(self, None, chunks)[1].reshape(B, -1, E)[:, :L]

    def _network(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        init = nn.initializers.xavier_uniform()

        def dense(width, name):
            return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name)

        hidden = lookup(FEED_FORWARDS, self.kind, "model.feed_forward")(x, self.width, dense)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not ctx.train)
        return dense(x.shape[-1], "down")(hidden)
