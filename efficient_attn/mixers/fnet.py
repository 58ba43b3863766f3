"""FNet: tokens mixed by a Fourier transform, without parameters (Lee-Thorp et al. 2021, arXiv 2105.03824)."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.inputs import without_padding


class FNet(nn.Module):
    """y = Re(F_seq(F_hidden(x))), the discrete Fourier transforms along the row and along the channels (eq. 3).

    Every position reads every other with fixed weights cos(2 pi (n l / L + e h / E)), not normalised. The paper's block has no
    output projection, and neither has this one. Padding counts as zeros; the transform spans the whole row, padding included, as
    in the released code, so that what a sequence becomes depends on the length it is padded to. Computed in float32 at least.

    causal: accepted for the sake of configurations; a transform has no causal form.
    """

    causal: bool = False
    dtype: Dtype = jnp.float32

    refuses_documents = "FNet transforms a whole row at once: packed documents (segment_ids) cannot be kept apart"

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if self.causal or ctx.decode:
            raise ValueError(
                "a Fourier transform reads the whole row: FNet is bidirectional and does not decode; set causal=False"
            )
        if ctx.segment_ids is not None:
            raise ValueError(self.refuses_documents)
        wide = without_padding(x, ctx.mask).astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.fft.fft2(wide, axes=(1, 2)).real.astype(self.dtype)
