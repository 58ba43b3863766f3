"""Which key positions a query position may attend to: a small algebra of frozen, hashable values.

A mask answers two questions about positions (integers, possibly negative; queries end where keys end by default):

- `allowed(q_pos, kv_pos)`: may this pair attend? Elementwise on broadcastable arrays, so one expression traces in XLA and
  inside a kernel.
- `tile(q_lo, q_hi, kv_lo, kv_hi)`: what holds on the rectangle of pairs between inclusive bounds? `SKIP`: no pair is allowed;
  `FULL`: all are; `PARTIAL`: neither is known. A kernel passes over the first, needs no test in the second. Elementwise on
  NumPy arrays of bounds, because a call classifies thousands of tiles.

SKIP < PARTIAL < FULL are the three truth values of Kleene's logic, in which and, or and not are minimum, maximum and
reflection; so any combination of masks has a `tile` that is never wrong, though it may say PARTIAL where a closer look would
know more. What depends on data (padding, packed documents, clusters) is not a mask: see `segment_ids` of `attend`.

A mask of your own is a frozen dataclass with these two methods; `tile` may always answer PARTIAL.
"""

import abc
import dataclasses

import numpy as np
from jaxtyping import Array, Bool, Int
from numpy import ndarray

SKIP, PARTIAL, FULL = 0, 1, 2

Bounds = ndarray | int
Positions = Int[Array, "..."] | Int[ndarray, "..."]
Truth = Bool[Array, "..."] | Bool[ndarray, "..."]


class Mask(abc.ABC):
    """Base of all masks; combine them with `&`, `|` and `~`."""

    @abc.abstractmethod
    def allowed(self, q_pos: Positions, kv_pos: Positions) -> Truth:
        """True where the query position may attend to the key position; shapes broadcast."""

    @abc.abstractmethod
    def tile(self, q_lo: Bounds, q_hi: Bounds, kv_lo: Bounds, kv_hi: Bounds) -> Bounds:
        """SKIP, PARTIAL or FULL for the pairs with q_lo <= q_pos <= q_hi and kv_lo <= kv_pos <= kv_hi."""

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair."""

    def allowed(self, q_pos, kv_pos):
        return (q_pos == q_pos) & (kv_pos == kv_pos)  # true everywhere, in the shape and kind of the arrays given

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        return FULL + 0 * (q_lo + kv_lo)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query: k <= q."""

    def allowed(self, q_pos, kv_pos):
        return kv_pos <= q_pos

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        return _truth(all_=kv_hi <= q_lo, some=kv_lo <= q_hi)


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """Keys less than `size` positions away on either side: |q - k| < size.

    `Causal() & Window(w)` is therefore the sliding window of w keys that ends at the query (Child et al. 2019; Mistral), and
    `Window(w // 2 + 1)` Longformer's window of w/2 on each side (Beltagy et al. 2020, section 3.1).
    """

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Window(size={self.size}): a window holds at least the query's own position; use size >= 1")

    def allowed(self, q_pos, kv_pos):
        return abs(q_pos - kv_pos) < self.size

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        nearest = np.maximum(np.maximum(kv_lo - q_hi, q_lo - kv_hi), 0)
        farthest = np.maximum(kv_hi - q_lo, q_hi - kv_lo)
        return _truth(all_=farthest < self.size, some=nearest < self.size)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Pairs that both masks allow (`left & right`)."""

    left: Mask
    right: Mask

    def allowed(self, q_pos, kv_pos):
        return self.left.allowed(q_pos, kv_pos) & self.right.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return np.minimum(self.left.tile(*bounds), self.right.tile(*bounds))


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Pairs that either mask allows (`left | right`)."""

    left: Mask
    right: Mask

    def allowed(self, q_pos, kv_pos):
        return self.left.allowed(q_pos, kv_pos) | self.right.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return np.maximum(self.left.tile(*bounds), self.right.tile(*bounds))


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Pairs that the mask does not allow (`~mask`)."""

    mask: Mask

    def allowed(self, q_pos, kv_pos):
        return ~self.mask.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return FULL - self.mask.tile(*bounds)


def _truth(*, all_, some):
    """FULL where all, else PARTIAL where some, else SKIP."""
    return np.where(all_, FULL, np.where(some, PARTIAL, SKIP))
