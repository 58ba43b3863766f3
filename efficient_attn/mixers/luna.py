"""Luna: attention through a packed sequence of fixed length (Ma et al. 2021, arXiv 2106.01540)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.ssm.inputs import segment_starts
from kernels.attention import Dropout, attend
from kernels.matmul import dot_general
from kernels.scan import ssd

REFUSES_DOCUMENTS = "luna: one sequence packs the whole row: without causal=True it takes no segment_ids"


class Luna(nn.Module):
    """Y_P = Attn(P, X, X) packs the sequence into l vectors, Y_X = Attn(X, Y_P, Y_P) reads it from there (eqs. 5 and 6).

    num_heads, head_dim: H, and D; None means E / H.
    packed_length: l; 16, 128 and 256 in the paper.
    causal: `causal_luna`, sums over the past in place of the packing softmax; it decodes in constant memory.
    dropout: rate on attention weights while training.
    use_bias: biases on the five projections.
    implementation: of `kernels.attention.attend`, or, where causal, of `kernels.scan.ssd`.

    Keys serve as values, in both steps, as in the released code. P is each layer's own and learned; in the paper the packed
    sequence goes on to the next layer, LayerNorm(Y_P + P), which the block's one output cannot carry.
    """

    num_heads: int = 4
    head_dim: int | None = None
    packed_length: int = 16
    causal: bool = False
    dropout: float = 0.0
    use_bias: bool = True
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        width = x.shape[-1]
        if self.head_dim is None and width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads={self.num_heads}; set head_dim")
        if ctx.decode and not self.causal:
            raise ConfigError("luna: only its causal form decodes token by token; set causal=True")
        if ctx.segment_ids is not None and not self.causal:
            raise ValueError(REFUSES_DOCUMENTS)
        packed = self.param("packed", nn.initializers.normal(1.0), (self.packed_length, width), jnp.float32)
        packed_query = self._heads(packed[None].astype(x.dtype), "packed_query")
        out = (self._causal if self.causal else self._bidirectional)(packed_query, x, ctx)
        return self._dense(width, "out", axis=(-2, -1))(out)

    def _bidirectional(self, packed_query, x, ctx: Context):
        packed_query = jnp.broadcast_to(packed_query, (x.shape[0], *packed_query.shape[1:]))
        real = jnp.ones(x.shape[:2], jnp.int32) if ctx.mask is None else ctx.mask.astype(jnp.int32)
        context = self._heads(x, "packed_key")
        segments = (jnp.ones(packed_query.shape[:2], jnp.int32), real)
        packed = self._attend(ctx, packed_query, context, segment_ids=segments)
        packed = self._heads(packed.reshape(*packed.shape[:2], -1), "key")
        return self._attend(ctx, self._heads(x, "query"), packed)

    def _attend(self, ctx: Context, q, kv, **options):
        if ctx.train and self.dropout:
            options["dropout"] = Dropout(self.dropout, self.make_rng("dropout"))
        return attend(q, kv, kv, implementation=self.implementation, **options)

    def _causal(self, packed_query, x, ctx: Context):
        """The whole row or, decoding, one chunk after the cached sums."""
        q, k, packed_key = (self._heads(x, name) for name in ("query", "key", "packed_key"))
        weights = packing_weights(packed_query[0], packed_key)
        weights = nn.Dropout(self.dropout)(weights, deterministic=not ctx.train)
        if not ctx.decode:
            return causal_luna(q, k, weights, ctx.mask, segment_starts(ctx.segment_ids), implementation=self.implementation)[0]
        is_filled = self.has_variable("cache", "count")
        (batch, _, heads, size), length = q.shape, self.packed_length
        shapes = dict(keys=(batch, heads, length, size), values=(batch, heads, size, length), count=(batch,))
        cache = {name: self.variable("cache", name, jnp.zeros, shape, jnp.float32) for name, shape in shapes.items()}
        before = tuple(cache[name].value for name in shapes)
        out, after = causal_luna(q, k, weights, before=before, implementation=self.implementation)
        if is_filled:
            for name, value in zip(shapes, after, strict=True):
                cache[name].value = value
        return out

    def _heads(self, x, name: str):
        return self._dense((self.num_heads, self.head_dim or x.shape[-1] // self.num_heads), name)(x)

    def _dense(self, features, name: str, axis=-1) -> nn.DenseGeneral:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            features, axis=axis, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )


def packing_weights(packed_query: Float[Array, "M H D"], key: Float[Array, "B L H D"]) -> Float[Array, "B L H M"]:
    """elu(P k_j / sqrt(D)) + 1, in float32 at least: how much of token j each packed position takes (section 3.3)."""
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    return jax.nn.elu(jnp.einsum("mhd,blhd->blhm", packed_query.astype(key.dtype), key) * key.shape[-1] ** -0.5) + 1


Sums = tuple[Float[Array, "B H M D"], Float[Array, "B H D M"], Float[Array, "B"]]


def causal_luna(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B L H D"],
    weights: Float[Array, "B L H M"],
    mask: Bool[Array, "B L"] | None = None,
    reset: Bool[Array, "B L"] | None = None,
    *,
    before: Sums | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H D"], Sums]:
    """y_t = 1/t a_t sum_{j <= t} w_j k_j^T with a_t = softmax(1/t q_t / sqrt(D) sum_{j <= t} k_j w_j^T) (eqs. 9 to 11).

    Both sums are states of `kernels.scan.ssd` without decay, over l packed positions (M below). t counts the real tokens of
    the document so far.

    weights: w_j >= 0 of `packing_weights`. mask: False at tokens that nothing reads. reset: True where a document starts.
    before: the two sums and t before the first token; 0 by default.

    Returns y, in the type of q, and the sums and t after the last token.
    """
    weights = weights if mask is None else jnp.where(mask[..., None, None], weights, 0)
    full_q, full_k = q.astype(weights.dtype) * q.shape[-1] ** -0.5, k.astype(weights.dtype)
    keys, values, count = (None, None, jnp.zeros(q.shape[:1], weights.dtype)) if before is None else before
    real = jnp.ones(q.shape[:2], weights.dtype) if mask is None else mask.astype(weights.dtype)
    so_far = count[:, None] + jnp.cumsum(real, axis=1)
    within = so_far if reset is None else so_far - jax.lax.cummax(jnp.where(reset, so_far - real, 0), axis=1)
    t = jnp.maximum(within, 1)[..., None, None]

    def summed(x, B, C, h0):
        steps = jnp.ones(x.shape[:3], x.dtype)
        return ssd(x, steps, None, B, C, softplus=False, reset=reset, h0=h0, implementation=implementation)

    scores, keys = summed(weights, full_k, full_q, keys)
    out, values = summed(full_k, weights, jax.nn.softmax(scores / t, axis=-1), values)
    return (out / t).astype(q.dtype), (keys, values, so_far[:, -1])
