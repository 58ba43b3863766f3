"""ETC's global-local attention with relative labels (Ainslie et al. 2020, arXiv 2004.08483)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import Context
from efficient_attn.positions import Places
from kernels.attention import biases, masks


@dataclasses.dataclass(frozen=True)
class GlobalLocalLabels:
    """Labels of pairs of a sequence whose first `global_tokens` tokens are the global input (section 3.2).

    Pairs of two long tokens: their clipped distance, 0 ... 2 clip. Then one label each for pairs (query, key) of global and
    global, global and long, long and global.
    """

    global_tokens: int
    clip: int

    @property
    def count(self) -> int:
        return 2 * self.clip + 4

    def __call__(self, q_pos, kv_pos):
        distance = jnp.clip(kv_pos - q_pos, -self.clip, self.clip) + self.clip
        q_is_global, kv_is_global = q_pos < self.global_tokens, kv_pos < self.global_tokens
        of_global_query = jnp.where(kv_is_global, 2 * self.clip + 1, 2 * self.clip + 2)
        return jnp.where(q_is_global, of_global_query, jnp.where(kv_is_global, 2 * self.clip + 3, distance))


@flax.struct.dataclass
class LabelTerms:
    """The position method that adds q_i . vectors[rule(i, j)] to each score (Shaw et al. 2018, eq. 3, without values)."""

    vectors: Any
    rule: Callable = flax.struct.field(pytree_node=False)

    def attend(self, function, places: Places, q: Float[Array, "B L H D"], k, v, *, bias=None, **options):
        table = jnp.einsum("blhd,rd->bhlr", q.astype(self.vectors.dtype), self.vectors)
        return function(q, k, v, bias=biases.chain(biases.Labels(table, self.rule), bias), **options)


class GlobalLocal(Attention):
    """Global and long input in one sequence: the first tokens see and are seen by all, the others see within a radius.

    The paper's four pieces (section 3.1): global-to-global, global-to-long and long-to-global are full, long-to-long is
    limited; one softmax over all that a token sees. Scores have Shaw's term q_i . a_label / sqrt(D) of a learned vector for each
    label (section 3.2). All pieces share their projections, one of the variants of the paper; its structural masks and labels
    of particular tasks are left out. Bidirectional only.

    global_tokens: n_g, tokens at the start of each sequence (or packed document) that are the global input: put there by the
        task, or by the model (pooling='cls' puts one).
    radius: r, positions seen on either side (84 in the released models).
    clip: k, the distance from which on distances share a label; 0 leaves labels out.
    """

    global_tokens: int = 1
    radius: int = 84
    clip: int = 12

    shift_invariant = False

    def pattern(self, length: int) -> masks.Mask:
        return masks.Global(tuple(range(min(self.global_tokens, length)))) | masks.Window(self.radius + 1)

    def _position_methods(self, width: int, ctx: Context) -> list:
        methods = super()._position_methods(width, ctx)
        if not self.clip:
            return methods
        rule, (_, _, head_dim) = GlobalLocalLabels(self.global_tokens, self.clip), self._sizes(width)
        vectors = self.param("labels", nn.initializers.normal(0.02), (rule.count, head_dim), jnp.float32)
        scale = head_dim**-0.5 if self.scale is None else self.scale
        return [*methods, LabelTerms(scale * vectors, rule)]
