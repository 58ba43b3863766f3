"""What a mixer is told besides its input."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

MEMORY = "memory"
"""The collection with a row for each stream: what its next segment continues from. All zeros is a memory of nothing."""


@flax.struct.dataclass
class Paging:
    """Where decoding finds each row's keys and values, if they lie in blocks of a pool that all rows share.

    tables: int [B, N], the blocks of each row in the order of its tokens. Block 0 is nobody's: what else is in a table names it.
    num_blocks, block_size: of the pool, and tokens in a block.
    """

    tables: Any
    num_blocks: int = flax.struct.field(pytree_node=False)
    block_size: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Context:
    """Passed positionally to every block and mixer, so that `nn.remat` and `nn.scan` carry it.

    mask: bool [B, L], True where a token is real; None means everywhere. A mixer lets nothing flow out of masked positions.
    segment_ids: int [B, L], packed documents; nothing flows between different ids. None means one document a row.
    positions: int [B, L], of each token in its own document; None means 0..L-1.
    bias: a position method that all layers share (`config.model.bias`); None means none.
    shared: parameters that several layers use, by name: what their mixers' `shared_parameters` ask the model for; None means
        none.
    paging: a `Paging` when keys and values are cached in blocks; None means a stretch of its own for each row.
    train: dropout is on and batch statistics are updated.
    decode: inputs continue what the `cache` collection holds, one token or one chunk at a time; without padding, and no
        further than the length that the cache was initialised with.
    """

    mask: Any = None
    segment_ids: Any = None
    positions: Any = None
    bias: Any = None
    shared: Any = None
    paging: Any = None
    train: bool = flax.struct.field(pytree_node=False, default=False)
    decode: bool = flax.struct.field(pytree_node=False, default=False)

    def __post_init__(self):
        if self.decode and (self.mask is not None or self.segment_ids is not None):
            raise ValueError("decoding takes no mask and no segment_ids: every token given is appended to every row's cache")

    def positions_or_default(self, batch: int, length: int) -> Int[Array, "B L"]:
        if self.positions is not None:
            return self.positions
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))

    def groups(self) -> Int[Array, "B L"] | None:
        """Segment ids in which masked positions are a segment of their own, -1; None where nothing separates tokens."""
        if self.mask is None:
            return self.segment_ids
        ids = jnp.zeros(self.mask.shape, jnp.int32) if self.segment_ids is None else self.segment_ids
        return jnp.where(self.mask, ids, -1)

    def document_positions(self) -> Int[Array, "B L"] | None:
        """How far each token is from the start of its packed document; None where nothing is packed.

        What a pattern of absolute positions sees: `positions` may be sampled or shifted. A document's tokens are neighbours.
        """
        if self.segment_ids is None:
            return None
        index = jnp.broadcast_to(jnp.arange(self.segment_ids.shape[1], dtype=jnp.int32)[None], self.segment_ids.shape)
        is_start = jnp.pad(self.segment_ids[:, 1:] != self.segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)
