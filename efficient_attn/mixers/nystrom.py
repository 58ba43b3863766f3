"""Nyström attention: softmax attention through landmarks (Xiong et al. 2021, Nyströmformer, arXiv 2102.03902)."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.mamba import uniform_fan_in
from kernels.attention import attend

REFUSES_DOCUMENTS = "nystrom: landmarks are means over the whole row: it takes no segment_ids; give each document its own row"


class NystromAttention(Attention):
    """Attention through landmarks (`nystrom`), and a convolution of the values beside it. Bidirectional only.

    num_landmarks: m, 64 in the paper.
    pinv_iterations: steps towards the pseudo-inverse.
    pinv_init: where they start, one of `INITS`.
    conv_kernel: taps, an odd number, of a depthwise convolution over values that is added to the output, one set for each head
        (section 3.4; 33 in the paper, 35 in its Long Range Arena code); 0 for none.

    The other fields are those of `Attention`. Attention weights are never formed, so they have no dropout, and position biases
    have nothing to act on.
    """

    num_landmarks: int = 64
    pinv_iterations: int = 6
    pinv_init: str = "exact"
    conv_kernel: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self._check(ctx)
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        positions = ctx.positions_or_default(*x.shape[:2])
        q = self._rotate(self._dense((heads, head_dim), "query")(x), positions)
        k = self._rotate(self._dense((kv_heads, head_dim), "key")(x), positions)
        v = self._dense((kv_heads, head_dim), "value")(x)
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
        mask = jnp.ones(x.shape[:2], bool) if ctx.mask is None else ctx.mask
        out = nystrom(
            q, k, v, mask, self.num_landmarks, iterations=self.pinv_iterations, init=self.pinv_init, scale=self.scale,
            implementation=self.implementation,
        )  # fmt: skip
        if self.conv_kernel:
            taps = self.param("conv", uniform_fan_in, (self.conv_kernel, heads), jnp.float32).astype(v.dtype)
            out = out + convolution(jnp.where(mask[..., None, None], v, 0), taps)
        return self._dense(x.shape[-1], "out", axis=(-2, -1))(out)

    def _check(self, ctx: Context) -> None:
        if self.causal or ctx.decode:
            raise ConfigError("nystrom: landmarks mix earlier and later positions; it has no causal form and no decoding")
        if ctx.segment_ids is not None:
            raise ValueError(REFUSES_DOCUMENTS)
        if ctx.bias is not None:
            raise ConfigError("nystrom: no scores are formed that a position bias could be added to; it goes with no model.bias")
        if self.dropout:
            raise ConfigError(f"nystrom: dropout={self.dropout}: no attention weights are formed; use 0 and model.dropout")
        if self.conv_kernel and self.conv_kernel % 2 == 0:
            raise ConfigError(f"nystrom: conv_kernel={self.conv_kernel} must be odd (as many taps before as after), or 0")


def nystrom(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H D"],
    mask: Bool[Array, "B L"],
    num_landmarks: int,
    *,
    iterations: int = 6,
    init: str = "exact",
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H D"]:
    """softmax(Q K~^T) Z softmax(Q~ K^T) V, with Z the pseudo-inverse of softmax(Q~ K~^T) (eq. 13). Time O(L m).

    Landmarks Q~ and K~ are means of queries and of keys over m runs of real tokens, as even as can be: those of a padded row
    are those of the row alone (in the released code padding counts as zeros, and m divides the length). A row of fewer than m
    real tokens has one landmark each. At most m positions, padding among them, are attended exactly, without landmarks; so a
    short row padded beyond m differs from the row alone by what the pseudo-inverse is off.

    mask: True at real tokens. scale: of scores; None is 1 / sqrt(D). implementation: of `kernels.attention.attend`.
    iterations, init: of `pseudo_inverse`.
    """
    options = dict(scale=scale, implementation=implementation)
    everyone, real = jnp.ones(mask.shape, jnp.int32), mask.astype(jnp.int32)
    if q.shape[1] <= num_landmarks:
        return attend(q, k, v, segment_ids=(everyone, real), **options)
    runs, is_there = landmarks(mask, num_landmarks)
    q_mean, k_mean = (means(x, mask, runs, num_landmarks) for x in (q, k))
    scores = jnp.einsum("bihd,bjhd->bhij", q_mean, k_mean) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = jnp.where(is_there[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    is_pair = is_there[:, None, :, None] & is_there[:, None, None, :]
    inverse = pseudo_inverse(jnp.where(is_pair, jax.nn.softmax(scores, axis=-1), 0), iterations, init)
    q_mean, k_mean, there = q_mean.astype(q.dtype), k_mean.astype(k.dtype), is_there.astype(jnp.int32)
    read = attend(q_mean, k, v, segment_ids=(jnp.ones_like(there), real), **options)
    spread = jnp.einsum("bhij,bjhd->bihd", inverse, read.astype(inverse.dtype)).astype(v.dtype)
    return attend(q, k_mean, spread, segment_ids=(everyone, there), **options)


def landmarks(mask: Bool[Array, "B L"], count: int) -> tuple[Int[Array, "B L"], Bool[Array, "B m"]]:
    """The landmark that each real token goes into, and which of the `count` landmarks there are."""
    rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    real = jnp.sum(mask, axis=1, dtype=jnp.int32, keepdims=True)
    there = jnp.minimum(real, count)
    return rank * there // jnp.maximum(real, 1), jnp.arange(count, dtype=jnp.int32)[None] < there


def means(x: Float[Array, "B L H D"], mask: Bool[Array, "B L"], runs: Int[Array, "B L"], count: int) -> Float[Array, "B m H D"]:
    """The mean over the real tokens of each run, in float32 at least; 0 where there are none."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    members = jax.nn.one_hot(runs, count, dtype=x.dtype) * mask[..., None]
    members = members / jnp.maximum(jnp.sum(members, axis=1, keepdims=True), 1)
    return jnp.einsum("blm,blhd->bmhd", members, x)


def pseudo_inverse(kernel: Float[Array, "B H m m"], iterations: int = 6, init: str = "exact") -> Float[Array, "B H m m"]:
    """Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, which tends to the pseudo-inverse of A (eq. 11).

    Z starts at A^T / (|A|_1 |A|_inf), where rows of A, a softmax, sum to 1, so that |A|_inf is 1. Rows and columns of zeros
    stay zeros.
    """
    largest = lookup(INITS, init, "model.mixer.pinv_init")(jnp.sum(kernel, axis=-2, keepdims=True))
    z = jnp.swapaxes(kernel, -1, -2) / jnp.where(largest > 0, largest, 1)
    identity = jnp.eye(kernel.shape[-1], dtype=kernel.dtype)[None, None]
    for _ in range(iterations):
        az = kernel @ z
        z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
    return z


INITS: Mapping[str, Callable] = {
    "exact": lambda column_sums: jnp.max(column_sums, axis=-1, keepdims=True),
    "original": lambda column_sums: jnp.max(column_sums, keepdims=True),
}
"""|A|_1 from the sums of columns: each head's own, or the largest of all heads and of the whole batch.

The second is the released code's default. A row's output then depends, slightly, on what else is in its batch.
"""


def convolution(v: Float[Array, "B L H D"], taps: Float[Array, "K H"]) -> Float[Array, "B L H D"]:
    """y_t = sum_d taps[d] v_{t + d - K // 2}, zeros beyond the ends: a sum of shifted products, as in `causal_conv`."""
    size, length = taps.shape[0], v.shape[1]
    line = jnp.pad(v, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
    return sum(taps[d][None, None, :, None] * line[:, d : d + length] for d in range(size))
