"""The short depthwise convolution of Mamba: each channel's last few values, within one document."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels.channels import spread


def causal_conv(
    x: Float[Array, "B L E"],
    weights: Float[Array, "K E"],
    bias: Float[Array, "E"] | None = None,
    *,
    before: Float[Array, "B K-1 E"] | None = None,
    starts: Bool[Array, "B L"] | None = None,
    reverse: bool = False,
) -> Float[Array, "B L E"]:
    """y_t = bias + sum_d weights[K - 1 - d] x_{t - d} over d = 0 .. K - 1; in reverse, of x_{t + d}.

    before: the K - 1 values that precede x (in reverse: that follow it); zeros by default.
    starts: True where a document starts; values of other documents count as zero.

    A sum of K shifted products: XLA's CPU backend fuses them into one loop, and has no fast depthwise convolution.
    """
    taps, length = weights.shape[0], x.shape[1]
    before = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype) if before is None else before

    def shifted(line, d):
        first = d if reverse else taps - 1 - d
        return line[:, first : first + length]

    line = jnp.concatenate([x, before] if reverse else [before, x], axis=1)
    y = spread(weights[-1], x.shape) * x
    y = y if bias is None else y + spread(bias, x.shape)
    if starts is not None:
        # between t and t - d lie the starts t - d + 1 .. t; between t and t + d lie t + 1 .. t + d
        edges = jnp.pad(starts, ((0, 0), (0, taps - 1) if reverse else (taps - 1, 0)))
        crossed = jnp.zeros_like(starts)
    for d in range(1, taps):
        tap = shifted(line, d)
        if starts is not None:
            crossed = crossed | shifted(edges, d if reverse else d - 1)
            tap = jnp.where(crossed[..., None], 0, tap)
        y = y + spread(weights[taps - 1 - d], x.shape) * tap
    return y
