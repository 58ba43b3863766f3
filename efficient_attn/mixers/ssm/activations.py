"""What follows a state-space model in its layer: the only nonlinearity, a GELU with or without a gate."""

from collections.abc import Callable, Mapping

import flax.linen as nn
from flax.typing import Dtype

from kernels.matmul import dot_general


def _drop_channels(x, rate: float, train: bool):
    return nn.Dropout(rate, broadcast_dims=(1,))(x, deterministic=not train)


def _dense(width: int, dtype: Dtype, name: str) -> nn.Dense:
    return nn.Dense(width, dtype=dtype, dot_general=dot_general, name=name)


def _gelu(y, *, dropout, train, dtype):
    return _drop_channels(nn.gelu(y), dropout, train)


def _full_glu(y, *, dropout, train, dtype):
    z = _drop_channels(nn.gelu(y), dropout, train)
    width = y.shape[-1]
    out = _dense(width, dtype, "value")(z) * nn.sigmoid(_dense(width, dtype, "gate")(z))
    return _drop_channels(out, dropout, train)


def _half_glu1(y, *, dropout, train, dtype):
    z = _drop_channels(nn.gelu(y), dropout, train)
    return _drop_channels(z * nn.sigmoid(_dense(y.shape[-1], dtype, "gate")(z)), dropout, train)


def _half_glu2(y, *, dropout, train, dtype):
    """The gate sees the activation, but multiplies what came before it."""
    z = _drop_channels(nn.gelu(y), dropout, train)
    return _drop_channels(y * nn.sigmoid(_dense(y.shape[-1], dtype, "gate")(z)), dropout, train)


ACTIVATIONS: Mapping[str, Callable] = {
    "gelu": _gelu,
    "full_glu": _full_glu,
    "half_glu1": _half_glu1,
    "half_glu2": _half_glu2,
}
"""GELU, then nothing, a gated linear unit (S4, DSS, LRU), or a gate alone (S5: Smith et al. 2023, appendix G.1).

Dropout takes whole channels of a sequence at a time, as the released S4 and S5 code does.
"""
