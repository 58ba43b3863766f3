"""Synthesizer: attention scores that are learned rather than products of tokens (Tay et al. 2020, arXiv 2005.00743)."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from efficient_attn.arguments import lookup
from efficient_attn.mixers.context import Context
from kernels.attention import Dropout, attend, biases, masks
from kernels.matmul import dot_general

Factors = tuple[Float[Array, "_ L H _"], Float[Array, "_ S H _"]]


class Synthesizer(nn.Module):
    """softmax(S) v with scores S_ij that do not compare token i with token j.

    Scores of low rank are products of factors, which take the place of queries and keys: memory stays linear in the length
    but for "random", whose parameters are the whole table.

    num_heads, head_dim: H, and D; None means E / H.
    mode: "dense", S_ij = W2_j . relu(W1 x_i + b1) + b2_j (eq. 2); "random", S = R (eq. 4); "factorized_random", S = R1 R2^T of
        rank `rank` (section 3.2.3). The paper's factorised dense form is left out.
    max_length: N, positions that have parameters. Longer inputs are an error.
    rank: k of "factorized_random", 8 in the paper and 32 in Long Range Arena's code.
    dot_product: add the usual q_i . k_j / sqrt(D) to the scores (the mixture "Random + Vanilla", section 3.3).
    dropout: rate on attention weights while training.
    use_bias: biases on the projections.
    implementation: of `kernels.attention.attend`.

    W2 is each head's own, in Long Range Arena's code all heads share it. Padding is not attended, in that code it is.
    """

    num_heads: int = 4
    head_dim: int | None = None
    mode: str = "random"
    max_length: int = 1024
    rank: int = 32
    dot_product: bool = False
    causal: bool = False
    dropout: float = 0.0
    use_bias: bool = True
    implementation: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        head_dim = self._head_dim(x)
        v = self.project(x, head_dim, "value")
        q, k = (self.project(x, head_dim, name) for name in ("query", "key")) if self.dot_product else (None, None)
        if ctx.decode:
            k, v, q_positions, kv_positions = self._decode(k, v)
            where = dict(q_positions=q_positions, kv_positions=kv_positions)
        else:
            q_positions = kv_positions = _positions(x.shape[1], ctx)
            where = dict(segment_ids=ctx.groups())
        pairs, bias = lookup(MODES, self.mode, "model.mixer.mode")(self, x, q_positions, kv_positions)
        if self.dot_product:
            pairs.append((q * head_dim**-0.5, k))
        q, k = _joined(pairs, x.shape[0])
        dropout = Dropout(self.dropout, self.make_rng("dropout")) if ctx.train and self.dropout else None
        mask = masks.Causal() if self.causal else masks.Full()
        out = attend(q, k, v, scale=1.0, mask=mask, bias=bias, dropout=dropout, implementation=self.implementation, **where)
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general,
            name="out",
        )(out)  # fmt: skip

    def _head_dim(self, x) -> int:
        if x.shape[1] > self.max_length:
            raise ValueError(f"synthesizer: a sequence of {x.shape[1]} positions is longer than max_length={self.max_length}")
        if self.head_dim is None and x.shape[-1] % self.num_heads:
            raise ValueError(f"width {x.shape[-1]} is not divisible by num_heads={self.num_heads}; set head_dim")
        return self.head_dim or x.shape[-1] // self.num_heads

    def project(self, x, size: int, name: str) -> Float[Array, "B L H R"]:
        init = nn.initializers.xavier_uniform()
        return nn.DenseGeneral(
            (self.num_heads, size), use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name
        )(x)

    def table(self, name: str, *shape: int) -> Float[Array, "..."]:
        """Parameters of `max_length` positions, as Glorot initialises a matrix of the last two axes."""
        init = nn.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=tuple(range(len(shape) - 2)))
        return self.param(name, init, shape, jnp.float32).astype(self.dtype)

    def _decode(self, k, v):
        """Append to the cache of values (and of keys, if tokens are compared): all of it, and the positions of both sides."""
        if not self.causal:
            raise ValueError("only causal attention decodes token by token; set causal=True")
        is_filled = self.has_variable("cache", "cache_index")
        batch, length = v.shape[:2]
        index = self.variable("cache", "cache_index", jnp.zeros, (batch,), jnp.int32)
        q_positions = index.value[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        write = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (start, 0, 0)))
        stored = []
        for name, new in (("cached_key", k), ("cached_value", v)):
            if new is not None:
                cache = self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
                if is_filled:
                    cache.value = write(cache.value, new, index.value)
                    new = cache.value
            stored.append(new)
        if is_filled:
            index.value = index.value + length
        slots = jnp.broadcast_to(jnp.arange(stored[1].shape[1], dtype=jnp.int32)[None], stored[1].shape[:2])
        return *stored, q_positions, slots


def _positions(length: int, ctx: Context) -> Int[Array, "_ L"]:
    positions = ctx.document_positions()
    return jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions


def _joined(pairs: list[Factors], batch: int) -> Factors:
    """Queries and keys [B, ...] whose product is the sum of the products of all pairs."""
    parts = [[jnp.broadcast_to(factor, (batch, *factor.shape[1:])) for factor in factors] for factors in zip(*pairs)]
    return jnp.concatenate(parts[0], axis=-1), jnp.concatenate(parts[1], axis=-1)


def _dense(mixer: Synthesizer, x, q_positions, kv_positions):
    """The hidden layer of each token is the query; its output weights for a position, and their bias, that position's key."""
    hidden = nn.relu(mixer.project(x, mixer._head_dim(x), "hidden"))
    weights = mixer.table("scores", mixer.num_heads, mixer.max_length, hidden.shape[-1])
    offsets = mixer.param("scores_bias", nn.initializers.zeros, (mixer.num_heads, mixer.max_length, 1), jnp.float32)
    keys = jnp.concatenate([weights, offsets.astype(weights.dtype)], axis=-1)
    hidden = jnp.concatenate([hidden, jnp.ones((*hidden.shape[:3], 1), hidden.dtype)], axis=-1)
    return [(hidden, _rows(keys, kv_positions))], None


def _factorized_random(mixer: Synthesizer, x, q_positions, kv_positions):
    first, second = (mixer.table(name, mixer.num_heads, mixer.max_length, mixer.rank) for name in ("scores_1", "scores_2"))
    return [(_rows(first, q_positions), _rows(second, kv_positions))], None


def _random(mixer: Synthesizer, x, q_positions, kv_positions):
    table = mixer.table("scores", mixer.num_heads, mixer.max_length, mixer.max_length)
    bias = biases.Dense(jnp.moveaxis(table[:, q_positions[:, :, None], kv_positions[:, None, :]], 0, 1))
    zeros = tuple(
        jnp.zeros((1, positions.shape[1], mixer.num_heads, 1), mixer.dtype) for positions in (q_positions, kv_positions)
    )
    return [] if mixer.dot_product else [zeros], bias


def _rows(table: Float[Array, "H N R"], positions: Int[Array, "_ L"]) -> Float[Array, "_ L H R"]:
    """The rows of these positions, for every head."""
    return jnp.moveaxis(jnp.take(table, positions, axis=1), 0, 2)


MODES: Mapping[str, Callable] = {"dense": _dense, "random": _random, "factorized_random": _factorized_random}
"""(mixer, x, positions of queries, of keys) -> (pairs of factors whose products are added up, a bias or None)."""
