"""H-Transformer-1D: exact attention near the diagonal, ever coarser away from it (Zhu & Soricut 2021, arXiv 2107.11906)."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.context import Context
from efficient_attn.positions import Places
from kernels.attention import Dropout, attend, biases, masks
from kernels.attention.merge import Part, merge


@dataclasses.dataclass(frozen=True)
class Cells:
    """Keys and values (or queries) of neighbouring tokens, averaged; `count` [B, n] real tokens make up each cell.

    arrays: [B, n, H, D] each, zero where a cell is empty.
    """

    arrays: tuple[Array, ...]
    count: Float[Array, "B n"]

    @classmethod
    def tokens(cls, arrays: tuple[Array, ...], valid: Bool[Array, "B L"], length: int) -> "Cells":
        """One cell for each token, and empty ones up to `length`. Averages are kept in float32 at least."""

        def pad(x):
            return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

        count = pad(valid.astype(jnp.promote_types(arrays[0].dtype, jnp.float32)))
        return cls(tuple(jnp.where(count[..., None, None] > 0, pad(x).astype(count.dtype), 0) for x in arrays), count)

    def coarser(self) -> "Cells":
        """Cells of twice the size (values are sums in the paper, here means whose weight is `count`)."""
        first, second = self.count[:, 0::2], self.count[:, 1::2]
        count = first + second
        share = (first / jnp.maximum(count, 1))[..., None, None]
        return Cells(tuple(share * x[:, 0::2] + (1 - share) * x[:, 1::2] for x in self.arrays), count)

    def levels(self, smallest: int) -> Iterator["Cells"]:
        """These cells, then ever coarser ones down to `smallest` cells."""
        cells = self
        yield cells
        while cells.count.shape[1] > smallest:
            cells = cells.coarser()
            yield cells


def padded_length(length: int, block_size: int) -> int:
    """The least block_size x 2^m, m >= 1, of at least `length` tokens."""
    blocks = max(2, -(-length // block_size))
    return block_size << (blocks - 1).bit_length()


def level_mask(level: int, block_size: int, causal: bool) -> masks.Mask:
    """Which cells a cell of this level sees: neighbouring blocks of `block_size` cells, without what finer levels see.

    Level 0 sees its own block and the ones beside it (only what is not later, if `causal`). Of the pairs of neighbouring
    blocks of coarser cells, the quadrant that touches the diagonal is the finer level's.
    """
    blocks = masks.BlockLocal(block_size, 1, 0 if causal else 1)
    if level == 0:
        return masks.Causal() & blocks if causal else blocks
    return blocks & ~masks.BlockLocal(block_size // 2, 1, 1)


def hierarchical_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B S G D"],
    v: Float[Array, "B S G Dv"],
    *,
    block_size: int,
    causal: bool,
    valid: Bool[Array, "B S"] | None = None,
    q_positions: Int[Array, "B L"] | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """sum_l P_l e^{S_l} V_l / sum_l P_l e^{S_l} 1: attention whose scores are constant over blocks that grow with the distance.

    At level l = 0, 1, ... tokens are averaged in cells of 2^l. The score of a pair is that of the means of its cells at the
    finest level whose neighbouring blocks of `block_size` cells hold the pair. Every pair is at exactly one level, so this is
    softmax attention where S <= 2 block_size, or where queries and keys are constant in each coarse cell.
    Levels are joined by their log-sum-exps, one maximum for all. Time and memory O(S block_size D).

    causal: keys after the query are not seen. The mean of a cell of queries would tell a query of later ones, so queries are
        not averaged: time O(S block_size D log(S / block_size)). The paper averages them.
    valid: False at keys (and queries) that are no tokens; None means all are.
    q_positions: where the queries stand among the keys (causal only); without it, L = S.
    implementation: of `attend`, which serves queries at given positions.
    """
    valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
    length = padded_length(k.shape[1], block_size)
    keys = list(Cells.tokens((k, v), valid, length).levels(2 * block_size))
    if causal:
        own = [q if q_positions is not None else _pad(q, length)] * len(keys)
    else:
        own = [cells.arrays[0] for cells in Cells.tokens((q,), valid, length).levels(2 * block_size)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    total: Part | None = None
    for level, (queries, cells) in reversed(list(enumerate(zip(own, keys)))):
        if q_positions is not None:
            part = _attend_at(q, q_positions, cells, level, block_size, scale=scale, implementation=implementation)
        else:
            options = dict(causal=causal, scale=scale, dropout=dropout)
            part = _attend_blocks(queries.astype(q.dtype), cells, level, block_size, **options)
        if not causal and total is not None:
            total = tuple(jnp.repeat(x, 2, axis=1) for x in total)
        total = part if total is None else merge([part, total])
    return total[0][:, : q.shape[1]]


def _attend_blocks(
    q: Float[Array, "B L H D"], cells: Cells, level: int, block_size: int, *, causal: bool, scale: float, dropout: Dropout | None
) -> Part:
    """Attention of each block of `block_size` cells' queries to the neighbouring blocks of cells, and its log-sum-exps.

    There are L queries for n cells: one for each, or those of the tokens in it. Scores take O(L block_size), never more.
    """
    offsets = [offset for offset in (-1, 0, 1) if (offset < 1 or not causal) and (offset or not level)]
    (B, L, H, D), (k, v), n = q.shape, cells.arrays, cells.count.shape[1] // block_size
    q = q.reshape(B, n, -1, k.shape[2], H // k.shape[2], D)
    k, v, weights = (_neighbours(x, n, offsets) for x in (k.astype(q.dtype), v.astype(q.dtype), cells.count))
    row = block_size + np.arange(q.shape[2]) * block_size // q.shape[2]  # the cell of each query of the second block
    column = np.concatenate([(1 + offset) * block_size + np.arange(block_size) for offset in offsets])
    seen = level_mask(level, block_size, causal).allowed(row[:, None], column[None])
    scores = scale * jnp.einsum("bnqgrd,bnkgd->bngrqk", q, k, preferred_element_type=cells.count.dtype)
    scores = jnp.where(seen, scores + jnp.log(weights)[:, :, None, None, None], -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    p = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = p.sum(axis=-1, keepdims=True)
    is_empty = total == 0
    p = p / jnp.where(is_empty, 1, total)
    if dropout is not None:
        keep = jax.random.bernoulli(jax.random.fold_in(dropout.key, level), 1 - dropout.rate, p.shape)
        p = jnp.where(keep, p / (1 - dropout.rate), 0)
    out = jnp.einsum("bngrqk,bnkgd->bnqgrd", p.astype(v.dtype), v)
    lse = jnp.where(is_empty, -jnp.inf, jnp.where(is_empty, 0, top) + jnp.log(jnp.where(is_empty, 1, total)))[..., 0]
    return out.reshape(B, L, H, -1), jnp.moveaxis(lse, 4, 2).reshape(B, L, H)


def _attend_at(q, q_positions, cells: Cells, level: int, block_size: int, *, scale: float, implementation: str | None) -> Part:
    """The causal form for queries anywhere in the sequence: what decoding asks for."""
    means = (x.astype(q.dtype) for x in cells.arrays)
    at = dict(q_positions=q_positions >> level, kv_positions=jnp.arange(cells.count.shape[1], dtype=jnp.int32))
    options = dict(mask=level_mask(level, block_size, causal=True), bias=biases.Dense(jnp.log(cells.count)[:, None, None, :]))
    return attend(q, *means, scale=scale, return_lse=True, implementation=implementation, **at, **options)


def _neighbours(x: Float[Array, "B S *rest"], n: int, offsets: Sequence[int]) -> Float[Array, "B n k *rest"]:
    """For each of n blocks of the second axis, the blocks at these offsets in a row; zeros beyond the ends."""
    blocks = jnp.pad(x.reshape(x.shape[0], n, -1, *x.shape[2:]), [(0, 0), (1, 1), *((0, 0),) * (x.ndim - 1)])
    return jnp.concatenate([blocks[:, 1 + offset : 1 + offset + n] for offset in offsets], axis=2)


def _pad(x: Float[Array, "B L H D"], length: int) -> Float[Array, "B n H D"]:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


class OfCells(Attention):
    """Base of attention to cells of neighbouring tokens: what would have to reach into a cell is an error.

    That is packed documents, position biases, and rotations that are more than turning queries and keys.
    """

    refuses_documents = "attention to cells of neighbouring tokens: packed documents (segment_ids) would share cells"

    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if ctx.segment_ids is not None:
            raise ValueError(self.refuses_documents)
        if ctx.bias is not None:
            raise ConfigError(f"model.bias does not go with {type(self).__name__}, whose scores are of cells")
        return super().__call__(x, ctx)

    def _turned(self, methods, q, k, at):
        """Nothing: tokens are turned where they are averaged."""
        return methods, q, k

    def _rotated(self, places: Places, q, k):
        """Queries and keys turned to their positions."""
        return (self._rotate(x, jnp.broadcast_to(at, x.shape[:2])) for x, at in ((q, places.q), (k, places.kv)))


class HTransformer1D(OfCells):
    """Multi-head attention by `hierarchical_attention`.

    block_size: N_r, tokens of a block at every level, an even number; 16 in the paper.

    Rotations turn tokens before they are averaged. Padding takes no part in the averages.
    A causal layer decodes from all keys and values, which it averages anew at each step.
    """

    block_size: int = 16

    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        if self.block_size < 2 or self.block_size % 2:
            raise ConfigError(
                f"model.mixer.block_size={self.block_size} must be even and at least 2: half a block is a quadrant's"
            )
        return super().__call__(x, ctx)

    def _attend(
        self, methods, places: Places, q, k, v, *, mask, segment_ids=None, q_positions=None, kv_positions=None, dropout=None
    ):
        q, k = self._rotated(places, q, k)
        return hierarchical_attention(
            q,
            k,
            v,
            block_size=self.block_size,
            causal=self.causal,
            valid=None if segment_ids is None else segment_ids >= 0,
            q_positions=q_positions,
            scale=self.scale,
            dropout=dropout,
            implementation=self.implementation,
        )
