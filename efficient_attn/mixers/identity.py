"""No mixing at all: the control that shows what a task gives away without any sequence mixer."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from efficient_attn.mixers.context import Context
from kernels.matmul import dot_general


class Identity(nn.Module):
    """A linear map of each position by itself. `causal` is accepted because this mixer is both."""

    causal: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        return nn.Dense(x.shape[-1], dtype=self.dtype, dot_general=dot_general, name="out")(x)
