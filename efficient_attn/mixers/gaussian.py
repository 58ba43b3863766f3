"""Hard-coded Gaussian attention: no queries and no keys (You, Sun & Iyyer 2020, arXiv 2005.00742)."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context
from kernels.matmul import dot_general

REACH = 6.0
"""Standard deviations after which weights are left out: there they are below float32's resolution of the largest one."""

NOBODY = -(2**31)
"""The segment of positions outside the sequence."""


def gaussian_attention(
    v: Float[Array, "B S H D"],
    centres: Sequence[int],
    stddev: float,
    *,
    before: int = 0,
    causal: bool = False,
    groups: Int[Array, "B S"] | None = None,
) -> Float[Array, "B L H D"]:
    """sum_j N(j; i + c_h, stddev^2) v_j for head h (section 3.1). Time O(S w), where w spans `REACH` deviations on either side.

    The weights are the density itself, not normalised anew over the keys there are: as in the released code, near an end of
    the sequence (or of a document, or of what a causal head sees) they sum to less than 1.

    v: values; the last L = S - before of them are also the positions that attend.
    centres: c_h, one for each head, in positions relative to the query's.
    causal: leave out positions after the query.
    groups: ids; positions of different ids do not see each other.
    """
    offsets = offsets_seen(centres, stddev, causal)
    distance = np.asarray(offsets)[:, None] - np.asarray(centres)[None, :]
    weights = np.exp(-0.5 * (distance / stddev) ** 2) / (stddev * math.sqrt(2 * math.pi))
    ends = (max(0, -offsets[0] - before), max(0, offsets[-1]))
    padded = jnp.pad(v, ((0, 0), ends, (0, 0), (0, 0))).astype(jnp.promote_types(v.dtype, jnp.float32))
    ids = None if groups is None else jnp.pad(groups, ((0, 0), ends), constant_values=NOBODY)
    length, start = v.shape[1] - before, before + ends[0]
    total = jnp.zeros((v.shape[0], length, *v.shape[2:]), padded.dtype)
    for offset, weight in zip(offsets, weights):
        seen = padded[:, start + offset : start + offset + length] * jnp.asarray(weight, padded.dtype)[None, None, :, None]
        if ids is not None:
            is_same = ids[:, start + offset : start + offset + length] == ids[:, start : start + length]
            seen = jnp.where(is_same[:, :, None, None], seen, 0)
        total = total + seen
    return total.astype(v.dtype)


def offsets_seen(centres: Sequence[int], stddev: float, causal: bool) -> range:
    """The distances key - query that any head gives weight to."""
    reach = math.ceil(REACH * stddev)
    last = max(centres) + reach
    return range(min(centres) - reach, (min(last, 0) if causal else last) + 1)


class HardCodedGaussian(nn.Module):
    """Heads whose attention is a fixed Gaussian around a neighbour of each position; only values and output are learned.

    num_heads, head_dim: H, and D; None means E / H.
    centres: c_h for each head. Empty: -1, 0, 1 cycled over the heads, and -1, 0 for the causal form (section 3.1).
    stddev: of the Gaussians, in positions.
    use_bias: biases on the two projections; the paper has none.
    """

    num_heads: int = 4
    head_dim: int | None = None
    centres: Sequence[int] = ()
    stddev: float = 1.0
    causal: bool = False
    use_bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        centres, head_dim = self._sizes(x.shape[-1])
        v = self._dense((self.num_heads, head_dim), "value")(x)
        if ctx.decode:
            out = self._decode(v, centres)
        else:
            out = gaussian_attention(v, centres, self.stddev, causal=self.causal, groups=ctx.groups())
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)

    def _sizes(self, width: int) -> tuple[tuple[int, ...], int]:
        cycle = (-1, 0) if self.causal else (-1, 0, 1)
        centres = tuple(self.centres) or tuple(cycle[h % len(cycle)] for h in range(self.num_heads))
        if len(centres) != self.num_heads:
            raise ConfigError(f"gaussian: centres={centres} must be one for each of num_heads={self.num_heads}, or empty")
        if not offsets_seen(centres, self.stddev, self.causal):
            raise ConfigError(
                f"gaussian: from centres={centres}, stddev={self.stddev} reaches no position at or before the query"
            )
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={self.num_heads}; set head_dim")
        return centres, self.head_dim or width // self.num_heads

    def _dense(self, features, name: str, axis=-1) -> nn.DenseGeneral:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            features, axis=axis, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )

    def _decode(self, v, centres):
        """The cache holds the last values that a head can reach, whatever the length; before the first they are zero."""
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        size = max(0, -offsets_seen(centres, self.stddev, causal=True)[0])
        is_filled = self.has_variable("cache", "last_values")
        last = self.variable("cache", "last_values", jnp.zeros, (v.shape[0], size, *v.shape[2:]), v.dtype)
        values = jnp.concatenate([last.value, v], axis=1)
        if is_filled:
            last.value = values[:, values.shape[1] - size :]
        return gaussian_attention(values, centres, self.stddev, before=size, causal=True)
