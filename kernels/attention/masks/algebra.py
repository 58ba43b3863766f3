"""The base of all masks, their combinations with `&`, `|` and `~`, masks that differ by head, and predicates of the user's."""

import abc
import dataclasses
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from numpy import ndarray

SKIP, PARTIAL, FULL = 0, 1, 2
LARGEST = 2**30
"""Of a mask's fields and positions: the sum of two is int32."""

Bounds = ndarray | np.integer | int
Positions = Int[Array, "..."] | Int[ndarray, "..."]
Truth = Bool[Array, "..."] | Bool[ndarray, "..."]


class Mask(abc.ABC):
    """Base of all masks; combine them with `&`, `|` and `~`.

    exact: `tile` says PARTIAL only where some pairs are allowed and some are not.
    needs_table: `allowed` looks something up in a constant array, which a Pallas kernel cannot capture.
    """

    exact = False
    needs_table = False

    @abc.abstractmethod
    def allowed(self, q_pos: Positions, kv_pos: Positions) -> Truth:
        """True where the query position may attend to the key position; shapes broadcast."""

    def tile(self, q_lo: Bounds, q_hi: Bounds, kv_lo: Bounds, kv_hi: Bounds) -> Bounds:
        """SKIP, PARTIAL or FULL for the pairs with q_lo <= q_pos <= q_hi and kv_lo <= kv_pos <= kv_hi."""
        return PARTIAL + 0 * (q_lo + kv_lo)

    def problem(self, heads: int, q_length: int | None, kv_length: int | None) -> str | None:
        """Why the mask does not fit so many heads, queries and keys, or None.

        The lengths are None where the call brings its own positions, which no length bounds.
        """
        return None

    def __and__(self, other: "Mask") -> "Mask":
        return _by_head(And, self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return _by_head(Or, self, other)

    def __invert__(self) -> "Mask":
        return _by_head(Not, self)


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every pair."""

    exact = True

    def allowed(self, q_pos, kv_pos):
        return (q_pos == q_pos) & (kv_pos == kv_pos)  # true everywhere, in the shape and kind of the arrays given

    def tile(self, q_lo, q_hi, kv_lo, kv_hi):
        return FULL + 0 * (q_lo + kv_lo)


class _Combination(Mask):
    """What the combinations of masks share; their fields are the masks combined."""

    @property
    def parts(self) -> tuple[Mask, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def needs_table(self):
        return any(part.needs_table for part in self.parts)

    def problem(self, heads, q_length, kv_length):
        problems = (part.problem(heads, q_length, kv_length) for part in self.parts)
        return next((problem for problem in problems if problem), None)


@dataclasses.dataclass(frozen=True)
class And(_Combination):
    """Pairs that both masks allow (`left & right`)."""

    left: Mask
    right: Mask

    def allowed(self, q_pos, kv_pos):
        return self.left.allowed(q_pos, kv_pos) & self.right.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return np.minimum(self.left.tile(*bounds), self.right.tile(*bounds))


@dataclasses.dataclass(frozen=True)
class Or(_Combination):
    """Pairs that either mask allows (`left | right`)."""

    left: Mask
    right: Mask

    def allowed(self, q_pos, kv_pos):
        return self.left.allowed(q_pos, kv_pos) | self.right.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return np.maximum(self.left.tile(*bounds), self.right.tile(*bounds))


@dataclasses.dataclass(frozen=True)
class Not(_Combination):
    """Pairs that the mask does not allow (`~mask`)."""

    mask: Mask

    @property
    def exact(self):
        return self.mask.exact

    def allowed(self, q_pos, kv_pos):
        return ~self.mask.allowed(q_pos, kv_pos)

    def tile(self, *bounds):
        return FULL - self.mask.tile(*bounds)


@dataclasses.dataclass(frozen=True)
class Predicate(Mask):
    """fn(q_pos, kv_pos) -> bool: any rule in NumPy or jnp operators, elementwise on broadcastable integer arrays.

    `fn` and `tile_rule` are static: give the same function objects each time (module-level functions, not fresh lambdas), or
    each call compiles again. `fn` is called with NumPy arrays to find the tiles to skip, and with traced ones.

    fn: e.g. `lambda q, k: (k <= q) & (k % 7 != 0)`.
    tile_rule: `tile` of the rule (see `Mask`), which need not look at every pair; None: known by looking at every pair, for
      calls of at most `tiles.PAIRS_LOOKED_AT` pairs.
    needs_table: set it where `fn` looks something up in an array.
    """

    fn: Callable[..., Truth]
    tile_rule: Callable[..., Bounds] | None = None
    needs_table: bool = False

    def allowed(self, q_pos, kv_pos):
        allowed = self.fn(q_pos, kv_pos)
        if not jnp.issubdtype(jnp.result_type(allowed), jnp.bool_):
            raise ValueError(f"Predicate: fn gave {jnp.result_type(allowed)}; booleans are expected, of elementwise comparisons")
        if isinstance(q_pos, ndarray) and isinstance(kv_pos, ndarray):
            allowed = np.asarray(allowed)
        return allowed & (q_pos == q_pos) & (kv_pos == kv_pos)  # in the shape of the pairs, whichever of them fn reads

    def tile(self, *bounds):
        return super().tile(*bounds) if self.tile_rule is None else self.tile_rule(*bounds)


@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
    """A mask for each query head: heads with patterns of their own (Child et al. 2019, section 4.3, the third integration).

    It is always outermost: `&`, `|` and `~` go to each head's mask. Implementations take it apart with `of_heads`.
    """

    masks: Iterable[Mask]

    def __post_init__(self):
        if not isinstance(self.masks, Iterable):
            raise ValueError(f"PerHead(masks={self.masks!r}): give one mask for each head")
        object.__setattr__(self, "masks", tuple(self.masks))
        if not self.masks or any(isinstance(mask, PerHead) or not isinstance(mask, Mask) for mask in self.masks):
            raise ValueError(f"PerHead(masks={self.masks}): give one mask for each head, none of them a PerHead")

    @property
    def needs_table(self):
        return any(mask.needs_table for mask in self.masks)

    def allowed(self, q_pos, kv_pos):
        raise TypeError("PerHead has a rule for each head: use those of masks.of_heads(mask)")

    def tile(self, *bounds):
        raise TypeError("PerHead has tiles for each head: use those of masks.of_heads(mask)")

    def problem(self, heads, q_length, kv_length):
        if len(self.masks) != heads:
            return f"PerHead holds {len(self.masks)} masks, one for each head; the queries have {heads} heads"
        return next(filter(None, (mask.problem(heads, q_length, kv_length) for mask in self.masks)), None)


def of_heads(mask: Mask) -> tuple[Mask, ...]:
    """The masks of the heads, none of them a `PerHead`: one for each, or a single one where all heads share it."""
    if not isinstance(mask, PerHead):
        return (mask,)
    return mask.masks[:1] if len(set(mask.masks)) == 1 else mask.masks


def truth(*, all_: Bounds | np.bool_ | bool, some: Bounds | np.bool_ | bool) -> ndarray:
    """The verdict on tiles: FULL where all pairs are allowed, else PARTIAL where some are, else SKIP."""
    return np.where(all_, FULL, np.where(some, PARTIAL, SKIP))


def whole_numbers(mask: Mask) -> None:
    """A `ValueError` where a field that should be an int is something else, or larger than positions can be."""
    for field in dataclasses.fields(mask):
        value = getattr(mask, field.name)
        if field.type is int and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise ValueError(f"{type(mask).__name__}: {field.name}={value!r}; a whole number is expected")
        if field.type is int and abs(value) > LARGEST:
            raise ValueError(
                f"{type(mask).__name__}: {field.name}={value!r}; at most {LARGEST} is expected, as positions are int32"
            )


def hashed_once(cls: type) -> type:
    """A frozen dataclass whose hash is computed once for each value, for those with long fields."""
    compute = cls.__hash__

    def __hash__(self):
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = compute(self)
        return self.__dict__["_hash"]

    cls.__hash__ = __hash__
    return cls


def _by_head(rule: type[_Combination], *masks: Mask) -> Mask:
    """`rule` of the masks, head by head where one of them is a `PerHead`."""
    for mask in masks:
        if not isinstance(mask, Mask):
            raise ValueError(f"{rule.__name__}: {mask!r} is {type(mask).__name__}; masks combine with masks alone")
    counts = {len(mask.masks) for mask in masks if isinstance(mask, PerHead)}
    if not counts:
        return rule(*masks)
    if len(counts) > 1:
        raise ValueError(f"masks of {' and '.join(map(str, sorted(counts)))} heads cannot be combined")
    heads = [mask.masks if isinstance(mask, PerHead) else (mask,) * max(counts) for mask in masks]
    return PerHead(tuple(rule(*of_head) for of_head in zip(*heads)))
