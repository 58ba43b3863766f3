"""S4ND: convolution of an image with outer products of state-space kernels (Nguyen et al. 2022, arXiv 2210.06583)."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jax.nn import initializers
from jaxtyping import Array, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.s4d import S4D
from efficient_attn.mixers.ssm.activations import ACTIVATIONS
from efficient_attn.mixers.ssm.inputs import without_padding
from kernels.convolution import separable_convolution

REFUSES_DOCUMENTS = "S4ND mixes a whole image: packed documents (segment_ids) have no 2-D form"


class S4ND(nn.Module):
    """The image, given row by row, convolved with k_rows[a] k_columns[b] (eq. 5), plus D u; an activation mixes the channels.

    Each axis has an S4D kernel for each channel. Convolving along one axis and then along the other is the same as the 2-D FFT
    of the released code, which multiplies by the outer product of the kernels' spectra.

    columns: pixels of a row. The last row may be incomplete; it counts as filled up with zeros.
    state_dim, A_init, discretisation, copies, dt_min, dt_max: as in `S4D`, for both axes.
    bandlimit: alpha: modes that turn faster than alpha / 2 cycles a step are left out of the kernel (section 3.3). 0: none are.
    rate: the sampling interval over that of training; 0.5 for twice the resolution (section 4.2).
    activation, dropout: as in `FeatureStateSpace`.

    Both axes are bidirectional. Shape: the image is [ceil(L / columns), columns].
    """

    columns: int
    causal: bool = False
    state_dim: int = 64
    A_init: str = "legs"
    discretisation: str = "zoh"
    copies: int = 1
    dt_min: float = 0.1
    dt_max: float = 1.0
    bandlimit: float = 0.0
    rate: float = 1.0
    activation: str = "full_glu"
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self._check(ctx)
        B, L, E = x.shape
        D = self.param("D", initializers.normal(1.0), (E,))
        rows, columns = (self._axis(name).systems(E) for name in ("rows", "columns"))
        u = without_padding(x, ctx.mask)
        wide = u.astype(jnp.result_type(u.dtype, D.dtype))
        image = jnp.pad(wide, ((0, 0), (0, -L % self.columns), (0, 0))).reshape(B, -1, self.columns, E)
        rows = tuple(system.kernel(image.shape[1]) for system in rows)
        columns = tuple(system.kernel(self.columns) for system in columns)
        y = separable_convolution(image, rows, columns).reshape(B, -1, E)[:, :L]
        y = (y + D[None, None, :] * wide).astype(self.dtype)
        activation = lookup(ACTIVATIONS, self.activation, "model.mixer.activation")
        return activation(y, dropout=self.dropout, train=ctx.train, dtype=self.dtype)

    def _axis(self, name: str) -> S4D:
        return S4D(
            name=name, state_dim=self.state_dim, A_init=self.A_init, discretisation=self.discretisation, copies=self.copies,
            dt_min=self.dt_min, dt_max=self.dt_max, bandlimit=self.bandlimit, rate=self.rate,
        )  # fmt: skip

    def _check(self, ctx: Context) -> None:
        if self.columns < 1:
            raise ValueError(f"model.mixer.columns={self.columns} must be at least 1, the pixels of a row")
        if self.causal or ctx.decode:
            raise ValueError("an image has no order: S4ND is bidirectional along both axes and does not decode; set causal=False")
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
