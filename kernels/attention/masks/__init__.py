"""Which key positions a query position may attend to: a small algebra of frozen, hashable values.

A mask answers two questions about positions (integers, possibly negative; queries end where keys end by default):

- `allowed(q_pos, kv_pos)`: may this pair attend? Elementwise on broadcastable arrays, so one expression traces in XLA and
  inside a kernel.
- `tile(q_lo, q_hi, kv_lo, kv_hi)`: what holds on the rectangle of pairs between inclusive bounds? `SKIP`: no pair is allowed;
  `FULL`: all are; `PARTIAL`: some are, or it is not known. A kernel passes over the first and needs no test in the second.
  Elementwise on NumPy arrays of bounds, because a call classifies thousands of tiles.

Masks combine with `&`, `|` and `~`. SKIP < PARTIAL < FULL are the three truth values of Kleene's logic, in which these are
minimum, maximum and reflection; so a combination's `tile` is never wrong, though it may say PARTIAL where a closer look would
know more (`tiles.tables` takes that look). Heads that differ are `PerHead((mask_0, ..., mask_H-1))`, always outermost.

What depends on data (padding, packed documents, clusters) is not a mask: see `segment_ids` of `attend`. A pattern of your own
is `Predicate(fn)`, or a frozen dataclass with `allowed` (and `tile`, for tiles to be skipped without looking at every pair).
"""

from kernels.attention.masks.algebra import FULL, PARTIAL, SKIP, And, Full, Mask, Not, Or, PerHead, Predicate, of_heads
from kernels.attention.masks.local import Band, BlockLocal, Causal, Local1D, Local2D, Window
from kernels.attention.masks.sparse import (
    Blocks,
    Fixed,
    Global,
    GlobalKeys,
    Strided,
    butterfly,
    permuted,
    random_blocks,
)

__all__ = [
    "FULL",
    "PARTIAL",
    "SKIP",
    "And",
    "Band",
    "BlockLocal",
    "Blocks",
    "Causal",
    "Fixed",
    "Full",
    "Global",
    "GlobalKeys",
    "Local1D",
    "Local2D",
    "Mask",
    "Not",
    "Or",
    "PerHead",
    "Predicate",
    "Strided",
    "Window",
    "butterfly",
    "of_heads",
    "permuted",
    "random_blocks",
]
