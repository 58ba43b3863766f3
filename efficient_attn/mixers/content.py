"""What mixers share whose pattern depends on the tokens themselves: projections to heads, and one row for each head."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Shaped

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context
from kernels.attention import Dropout
from kernels.matmul import dot_general

NOBODY = -(2**31)
"""The segment of slots that stand for no token."""

LAST = 2**31 - 1
"""The group of padding where tokens are sorted: after all others."""


class ContentAttention(nn.Module):
    """Multi-head attention in which each head finds by content what a token sees.

    num_heads: H.
    head_dim: D; None means E / H.
    causal: position i attends only positions <= i.
    dropout: rate on attention weights while training.
    use_bias: biases on the projections.
    implementation: of `kernels.attention.attend`; None means the fastest for the platform.
    """

    num_heads: int = 4
    head_dim: int | None = None
    causal: bool = False
    dropout: float = 0.0
    use_bias: bool = True
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    decodes: ClassVar[bool] = False
    """Whether what a token sees does not depend on later tokens, so that it can be continued."""

    def project(self, x: Float[Array, "B L E"], name: str, heads: int | None = None) -> Float[Array, "B L H D"]:
        """A projection to all heads, or to as many as `heads`."""
        width = x.shape[-1]
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={self.num_heads}; set head_dim")
        return self._dense((heads or self.num_heads, self.head_dim or width // self.num_heads), name)(x)

    def output(self, out: Float[Array, "B L H D"], width: int) -> Float[Array, "B L E"]:
        """What the heads found, joined."""
        return self._dense(width, "out", axis=(-2, -1))(out)

    def weights_dropout(self, ctx: Context) -> Dropout | None:
        return Dropout(self.dropout, self.make_rng("dropout")) if ctx.train and self.dropout else None

    def check(self, ctx: Context, **positive: int) -> None:
        """Raise where the context asks for what the mechanism has not, or an argument is below 1."""
        name = type(self).__name__.lower()
        if ctx.bias is not None:
            raise ConfigError(f"model.bias does not go with the mixer {name!r}: what it attends is sorted; set no model.bias")
        if ctx.decode and not self.decodes:
            raise ValueError(f"{name}: what a token sees depends on later tokens too, so it does not decode token by token")
        for argument, value in positive.items():
            if value < 1:
                raise ConfigError(f"model.mixer (name={name!r}): {argument}={value} must be at least 1")

    def _dense(self, features, name: str, axis=-1) -> nn.DenseGeneral:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            features, axis=axis, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )


def groups_or_zero(ctx: Context, batch: int, length: int) -> Int[Array, "B L"]:
    """Segment ids: zero where nothing separates tokens, and `LAST` for padding, so that it is sorted to the end."""
    groups = ctx.groups()
    return jnp.zeros((batch, length), jnp.int32) if groups is None else jnp.where(groups == -1, LAST, groups)


def take(rows: Shaped[Array, "R S *F"], index: Int[Array, "R N"]) -> Shaped[Array, "R N *F"]:
    """Row by row, the tokens at these places."""
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *(1,) * (rows.ndim - 2)), axis=1)
