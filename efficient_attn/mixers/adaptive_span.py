"""Adaptive attention span: each head learns how far back it looks (Sukhbaatar et al. 2019, arXiv 1905.07799)."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.local import Bounded
from efficient_attn.positions import Places
from kernels.attention import biases, masks


@functools.partial(jax.tree_util.register_dataclass, data_fields=["spans"], meta_fields=["ramp"])
@dataclasses.dataclass(frozen=True)
class SoftSpan(biases.Bias):
    """score + log m_z(|i - j|), m_z(x) = clip((R + z - x) / R, 0, 1) (eq. 3): weights m e^s / sum m e^s (eq. 4).

    spans: z [B or 1, H, L or 1, 1], in positions, of each head or also each query. ramp: R, positions over which m falls to 0.
    """

    spans: Any
    ramp: float

    def axes(self):
        return [("B", "H", "L", None)]

    def score(self, score, q_pos, kv_pos, head):
        distance = jnp.abs(q_pos - kv_pos).astype(score.dtype)
        m = jnp.clip((self.ramp + self.spans.astype(score.dtype) - distance) / self.ramp, 0, 1)
        is_seen = m > 0
        return jnp.where(is_seen, score + jnp.log(jnp.where(is_seen, m, 1)), -jnp.inf)


@flax.struct.dataclass
class SpanTerm:
    """The position method that limits spans, by distances in the row, around another one or None."""

    span: SoftSpan
    inner: Any

    def attend(self, function, places: Places, q: Float[Array, "B L H D"], k, v, *, bias=None, **options):
        if self.inner is not None:
            function = functools.partial(self.inner.attend, function, places)
        return function(q, k, v, bias=biases.chain(self.span, bias), **options)


@jax.custom_vjp
def clipped(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """clip(x, 0, 1), at whose ends the gradient is dropped only where a step down it would lead further out.

    Plain clipping would leave a span that has reached 0 there for ever; the released code clips the parameter after each step.
    """
    return jnp.clip(x, 0, 1)


def _clipped_backward(x, g):
    return (jnp.where(((x <= 0) & (g > 0)) | ((x >= 1) & (g < 0)), 0, g),)


clipped.defvjp(lambda x: (clipped(x), x), _clipped_backward)


class AdaptiveSpan(Bounded):
    """Attention whose heads see z + R positions on either side (before, if causal), z learned in 0 ... S.

    max_span: S; nothing farther is computed, and decoding keeps no more. 8,192 in the paper's large models.
    ramp: R, 32 in the paper.
    init_span: z before training, for every head. With `dynamic`, what z is before training on average.
    dynamic: z_t = S sigmoid(v . x_t + b) of each token, for each head (section 2.3), instead of one z a head.
    span_loss: lambda; lambda / H sum_h z_h is sown into `losses` as `mean_span` (eq. 5), with `dynamic` averaged over tokens.

    The paper's models add relative position embeddings: `bias=dict(name="shaw")` or "transformer_xl". The paper is causal; the
    other form looks as far ahead as back. Distances are those in the row, whatever `ctx.positions` are.
    """

    max_span: int = 1024
    ramp: float = 32.0
    init_span: float = 0.0
    dynamic: bool = False
    span_loss: float = 2e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self._check()
        spans = self._dynamic(x) if self.dynamic else self._static(x)
        weights = jnp.ones(x.shape[:2], spans.dtype) if ctx.mask is None else ctx.mask.astype(spans.dtype)
        by_token = jnp.broadcast_to(spans.mean(axis=(1, 3)), x.shape[:2])
        mean = jnp.sum(by_token * weights) / jnp.maximum(jnp.sum(weights), 1)
        self.sow("losses", "mean_span", self.span_loss * mean)
        return super().__call__(x, ctx.replace(bias=SpanTerm(SoftSpan(spans, self.ramp), ctx.bias)))

    @property
    def lookback(self) -> int:
        return self.max_span - 1

    def pattern(self, length: int) -> masks.Mask:
        return masks.Window(self.max_span)

    def _check(self) -> None:
        if self.max_span < 1 or self.ramp <= 0:
            raise ConfigError(f"model.mixer: max_span={self.max_span} must be at least 1, and ramp={self.ramp} more than 0")
        if not 0 <= self.init_span <= self.max_span or (self.dynamic and self.init_span in (0, self.max_span)):
            between = "strictly between" if self.dynamic else "between"
            raise ConfigError(f"model.mixer.init_span={self.init_span} must be {between} 0 and max_span={self.max_span}")

    def _static(self, x) -> Float[Array, "1 H 1 1"]:
        share = self.param("span", nn.initializers.constant(self.init_span / self.max_span), (self.num_heads,), jnp.float32)
        return self.max_span * clipped(share)[None, :, None, None]

    def _dynamic(self, x) -> Float[Array, "B H L 1"]:
        odds = self.init_span / (self.max_span - self.init_span)
        dense = nn.Dense(self.num_heads, bias_init=nn.initializers.constant(jnp.log(odds)), dtype=jnp.float32, name="span")
        return self.max_span * jnp.swapaxes(nn.sigmoid(dense(x)), 1, 2)[..., None]
