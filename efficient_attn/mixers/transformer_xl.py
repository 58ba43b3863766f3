"""Segment-level recurrence: attention that also sees what the segments before it left behind.

What a stream remembers lies in the collection `memory`, one row for each stream, and all zeros is a memory of nothing. Give the
collection and have it returned (`mutable=["memory"]`), and a segment continues the one before; where it is neither given nor
wanted, a segment stands alone. The train loop carries it in the train state, evaluation from batch to batch.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import MEMORY, Context
from efficient_attn.positions import Places
from kernels.attention import Dropout

States = Float[Array, "B M E"]
Ids = Int[Array, "B M"]


class TransformerXL(Attention):
    """Attention to the segment and the `memory_length` states before it (Dai et al. 2019, arXiv 1901.02860, section 3.2).

    Queries come from the segment, keys and values from [SG(memory), segment]; a layer's memory is the last states that entered
    it, and no gradient passes it. Positions are relative, by default as in section 3.3. Before a norm (`model.prenorm=False`, the
    paper's form) these are the block's inputs; after one, its normed inputs, as normed when they were remembered. Documents
    (segment_ids that go on counting from segment to segment) see nothing of each other, in memory neither. Decoding keeps every
    key and value instead.

    memory_length: M while training. eval_memory_length: elsewhere; None means the same.
    """

    bias: Mapping = FrozenDict(name="transformer_xl")
    memory_length: int = 128
    eval_memory_length: int | None = None

    has_memory = True
    """Whether the mixer carries state from segment to segment, in the collection `memory`."""
    remembers_output = False
    """Whether it is shown its block's output to remember (`remember`), instead of remembering its input by itself."""

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        past, past_ids = self.recall(x, ctx)
        ids = self.document_ids(x, ctx)
        seen = jnp.concatenate([past, x], axis=1)
        heads, kv_heads, head_dim = self._sizes(x.shape[-1])
        q = self._dense((heads, head_dim), "query")(x)
        k = self._dense((kv_heads, head_dim), "key")(seen)
        v = self._dense((kv_heads, head_dim), "value")(seen)
        methods = self._position_methods(x.shape[-1], ctx)
        if ctx.decode:
            return self._dense(x.shape[-1], "out", axis=(-2, -1))(self._decode(methods, q, k, v, ctx))
        options = dict(mask=self.mask(x.shape[1]), segment_ids=(ids, jnp.concatenate([past_ids, ids], axis=1)))
        if ctx.train and self.dropout:
            options["dropout"] = Dropout(self.dropout, self.make_rng("dropout"))
        places = self._places(x.shape[1], seen.shape[1], ctx)
        out = self._attend(methods, places, q, k, v, **options)
        y = self._dense(x.shape[-1], "out", axis=(-2, -1))(out) + self.long_term(x, ids, ctx)
        if not self.remembers_output and past.shape[1]:
            self.remember(x, ctx)
        return y

    def recall(self, x: Float[Array, "B L E"], ctx: Context) -> tuple[States, Ids]:
        """States of this stream's past, the latest last, and the documents they belong to (0: nothing is there)."""
        M = self.memory_length if ctx.train or self.eval_memory_length is None else self.eval_memory_length
        return self.stored(x, "states", M, ctx)

    def stored(self, x: Float[Array, "B L E"], name: str, length: int, ctx: Context) -> tuple[States, Ids]:
        """The stretch of memory of this name, empty at first; of length 0 where nothing is carried."""
        if self.is_initializing() or ctx.decode or not (self.has_variable(MEMORY, name) or self.is_mutable_collection(MEMORY)):
            return jnp.zeros((x.shape[0], 0, x.shape[2]), x.dtype), jnp.zeros((x.shape[0], 0), jnp.int32)
        states = self.variable(MEMORY, name, jnp.zeros, (x.shape[0], length, x.shape[2]), x.dtype)
        ids = self.variable(MEMORY, f"{name}_ids", jnp.zeros, (x.shape[0], length), jnp.int32)
        return jax.lax.stop_gradient(states.value), ids.value

    def remember(self, x: Float[Array, "B L E"], ctx: Context) -> None:
        """Append the segment's states to the memory, whose oldest states drop out."""
        if self.has_variable(MEMORY, "states") and self.is_mutable_collection(MEMORY):
            self.push("states", jax.lax.stop_gradient(x), self.document_ids(x, ctx))

    def push(self, name: str, states: States, ids: Ids) -> tuple[States, Ids]:
        """Append to a stretch of memory; returns what dropped out of it."""
        all_states = jnp.concatenate([self.get_variable(MEMORY, name), states], axis=1)
        all_ids = jnp.concatenate([self.get_variable(MEMORY, f"{name}_ids"), ids], axis=1)
        if self.is_mutable_collection(MEMORY):
            self.put_variable(MEMORY, name, all_states[:, states.shape[1] :])
            self.put_variable(MEMORY, f"{name}_ids", all_ids[:, ids.shape[1] :])
        return all_states[:, : states.shape[1]], all_ids[:, : ids.shape[1]]

    def document_ids(self, x: Float[Array, "B L E"], ctx: Context) -> Int[Array, "B L"]:
        """The document of each position from 1 on; 0 is padding, and an empty place of the memory."""
        groups = ctx.groups()
        return jnp.ones(x.shape[:2], jnp.int32) if groups is None else groups + 1

    def long_term(self, x: Float[Array, "B L E"], ids: Int[Array, "B L"], ctx: Context) -> Float[Array, "B L E"] | float:
        """What a memory of another kind adds to the output."""
        return 0.0

    def _places(self, length: int, seen: int, ctx: Context) -> Places:
        if seen > length:
            return Places.in_order(length, seen, causal=self.causal)
        return Places.of_tokens(length, ctx.positions, ctx.groups(), causal=self.causal)


class ErnieDoc(TransformerXL):
    """Enhanced recurrence (Ding et al. 2021, arXiv 2012.15688, section 3.3): a layer's memory is its own block's last outputs.

    [SG(h^n of the segment before), h^{n-1}] instead of h^{n-1} of both, so that what a position sees is not bounded by the depth:
    each segment passes everything on to the next. This is the paper's recurrence alone: the two passes over a document (skim and
    retrospective) and the segment-reordering objective are not here.
    """

    remembers_output = True
