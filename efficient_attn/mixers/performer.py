"""Performer: linear attention by random features that estimate the softmax kernel (Choromanski et al. 2021, 2009.14794)."""

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.linear_attention import LinearAttention

Projection = Float[Array, "M D"]


def orthogonal(key: PRNGKeyArray, num_features: int, size: int) -> Projection:
    """Rows w_m ~ N(0, I) that are orthogonal to each other in blocks of `size` (section 2.4).

    Each block is a Haar-distributed orthogonal matrix; each row has the norm of an independent Gaussian vector. `jax.random`
    fixes the signs that a plain QR decomposition leaves, without which the estimates below are biased.
    """
    key, norms = jax.random.split(key)
    blocks = jax.random.orthogonal(key, size, shape=(-(-num_features // size),)).reshape(-1, size)[:num_features]
    return blocks * jnp.linalg.norm(jax.random.normal(norms, (num_features, size)), axis=-1, keepdims=True)


def independent(key: PRNGKeyArray, num_features: int, size: int) -> Projection:
    """Independent rows w_m ~ N(0, I)."""
    return jax.random.normal(key, (num_features, size))


def softmax_features(x: Float[Array, "B L H D"], projection: Projection | None, *, is_query: bool) -> Float[Array, "B L H M"]:
    """`positive_features` with the largest exponent of its row as a query's shift, which normalisation cancels, and 0 as a key's.

    The released code shifts keys by the largest exponent of all: what epsilon does to one key then depends on padding, on other
    documents, and on keys still to come.
    """
    exponents = softmax_exponents(x, projection)
    shift = jax.lax.stop_gradient(exponents.max(axis=-1, keepdims=True)) if is_query else jnp.zeros_like(exponents[..., :1])
    return positive_features(exponents, shift)


def softmax_exponents(x: Float[Array, "B L H D"], projection: Projection | None) -> Float[Array, "B L H M"]:
    """W x - |x|^2 / 2 with x scaled by D^-1/4, in float32 at least."""
    if projection is None:
        raise ConfigError("performer: num_features=0 goes with kernel='relu'; 'softmax' needs at least 1, or None")
    x = _scaled(x)
    return jnp.einsum("blhd,md->blhm", x, projection.astype(x.dtype)) - jnp.sum(x**2, axis=-1, keepdims=True) / 2


def positive_features(
    exponents: Float[Array, "B L H M"], shift: Float[Array, "#B #L #H 1"], epsilon: float = 1e-4
) -> Float[Array, "B L H M"]:
    """phi(x) = M^-1/2 (exp(W x - |x|^2 / 2 - shift) + epsilon) (lemma 1).

    Without shift and epsilon, E[phi(q) . phi(k)] = exp(q . k / sqrt(D)). Epsilon keeps denominators away from 0.
    """
    return (jnp.exp(exponents - shift) + epsilon) * exponents.shape[-1] ** -0.5


def relu_features(x: Float[Array, "B L H D"], projection: Projection | None, *, is_query: bool) -> Float[Array, "B L H M"]:
    """phi(x) = relu(W x) + 0.001, x scaled by D^-1/4 ("generalized attention", section 2.2); without W, relu(x) + 0.001."""
    x = _scaled(x)
    x = x if projection is None else jnp.einsum("blhd,md->blhm", x, projection.astype(x.dtype))
    return jax.nn.relu(x) + 1e-3


def _scaled(x: Float[Array, "B L H D"]) -> Float[Array, "B L H D"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25


KERNELS: Mapping[str, Callable] = {"softmax": softmax_features, "relu": relu_features}
"""(x, projection, is_query) -> features of queries or of keys."""


def random_features(
    module: nn.Module, draw: Callable[[PRNGKeyArray], Array], redraw_every: int, ctx: Context
) -> Float[Array, "..."]:
    """What `draw` drew, kept in the module's collection `features` and drawn anew in training.

    redraw_every: training passes (micro-batches) that use one draw; 0 keeps the first one. `age` counts them, in float32 like
        all that is stored there. Outside training, and where `features` may not be written, nothing changes.
    """
    projection = module.variable("features", "projection", lambda: draw(module.make_rng("params")))
    age = module.variable("features", "age", jnp.zeros, (), jnp.float32)
    if redraw_every and ctx.train and module.is_mutable_collection("features") and not module.is_initializing():
        key, is_old = module.make_rng("dropout"), age.value >= redraw_every
        projection.value = jax.lax.cond(is_old, lambda: draw(key).astype(projection.value.dtype), lambda: projection.value)
        age.value = jnp.where(is_old, 1.0, age.value + 1)
    return projection.value


class Performer(LinearAttention):
    """Linear attention whose features estimate the softmax (FAVOR+), or generalise ReLU, all heads by one projection.

    num_heads, head_dim, causal, use_bias, implementation: as in `LinearAttention`, from which it decodes alike.
    kernel: "softmax", positive features (`softmax_features`), or "relu" (`relu_features`).
    num_features: M; None means D ln D, rounded down, as in the released PyTorch code. 0 means none drawn ("relu" only): the
        kernel of the queries and keys themselves, which Long Range Arena used.
    orthogonal: rows of the projection orthogonal in blocks of D; otherwise independent.
    redraw_every: training passes after which the projection is drawn anew; 0 never.

    Attention weights are never formed, so they have no dropout. Positions: those the model adds to its embeddings.
    """

    kernel: str = "softmax"
    num_features: int | None = None
    orthogonal: bool = True
    redraw_every: int = 1000

    def feature_maps(self, q, k, ctx: Context):
        kernel, projection = lookup(KERNELS, self.kernel, "model.mixer.kernel"), self.projection(q.shape[-1], ctx)
        return kernel(q, projection, is_query=True), kernel(k, projection, is_query=False)

    def projection(self, size: int, ctx: Context) -> Projection | None:
        """[M, D], or None where nothing is drawn."""
        count = max(1, int(size * math.log(size))) if self.num_features is None else self.num_features
        if not count:
            return None
        draw = orthogonal if self.orthogonal else independent
        return random_features(self, lambda key: draw(key, count, size), self.redraw_every, ctx)
