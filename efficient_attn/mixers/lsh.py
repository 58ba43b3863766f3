"""Locality-sensitive hashing, and attention inside windows of tokens sorted by their hash."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from efficient_attn.mixers.content import NOBODY, take
from kernels.attention import Dropout, attend, biases, masks, merge


def draw_rotations(key: PRNGKeyArray, heads: int, head_dim: int, rounds: int, buckets: Sequence[int]) -> Float[Array, "H D R K"]:
    """Independent normal rotations of every head and hash round; K is the sum of half the bucket counts."""
    return jax.random.normal(key, (heads, head_dim, rounds, sum(buckets) // 2), jnp.float32)


def angular_hash(x: Float[Array, "B L H D"], rotations: Float[Array, "H D R K"], buckets: Sequence[int]) -> Int[Array, "B H R L"]:
    """The bucket of each vector in each round: h(x) = argmax [x R; -x R] (Andoni et al. 2015; Kitaev et al. 2020, section 2).

    Vectors at a small angle mostly share a bucket; their lengths do not matter. Several factors in `buckets` are hashes of
    their own, whose results are the digits of the bucket: n_1 n_2 buckets for the cost of n_1 + n_2.

    Raises ValueError where a count is odd, or they do not fit the rotations.
    """
    if any(n < 2 or n % 2 for n in buckets) or sum(buckets) != 2 * rotations.shape[-1]:
        raise ValueError(
            f"angular_hash: buckets={tuple(buckets)} for {rotations.shape[-1]} rotated axes; use even ones, twice as many in all"
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rotated = jnp.einsum("blhd,hdrk->bhrlk", x.astype(dtype), rotations.astype(dtype))
    bucket, start = jnp.int32(0), 0
    for n in buckets:
        part = rotated[..., start : start + n // 2]
        bucket = bucket * n + jnp.argmax(jnp.concatenate([part, -part], axis=-1), axis=-1).astype(jnp.int32)
        start += n // 2
    return bucket


def windows(
    x: Shaped[Array, "R N *F"], size: int, before: int, after: int, *, fill: int | None = None
) -> Shaped[Array, "R n w *F"]:
    """For each chunk of `size` tokens, itself and its neighbours: w = (before + 1 + after) size.

    The ends are joined to a circle, unless `fill` says what stands in for neighbours that do not exist.
    """
    chunks = x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])
    index = jnp.arange(chunks.shape[1])

    def neighbour(shift: int):
        rolled = jnp.roll(chunks, -shift, axis=1)
        if fill is None or shift == 0:
            return rolled
        exists = (index + shift >= 0) & (index + shift < len(index))
        return jnp.where(exists.reshape(1, -1, *(1,) * (x.ndim - 1)), rolled, fill)

    return jnp.concatenate([neighbour(shift) for shift in range(-before, after + 1)], axis=2)


def window_attention(
    q: Float[Array, "R N D"],
    k: Float[Array, "R N D"],
    v: Float[Array, "R N Dv"],
    *,
    positions: Int[Array, "R N"],
    segments: Int[Array, "R N"],
    mask: masks.Mask,
    size: int,
    before: int = 0,
    after: int = 0,
    circular: bool = False,
    rounds: Int[Array, "R N T 2"] | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "R N Dv"], Float[Array, "R N"]]:
    """Rows of tokens in any order, in chunks of `size`, of which each attends itself and its neighbours: (out, log-sum-exp).

    Time and memory O(N size (before + 1 + after)). N is a multiple of `size`.

    positions: what `mask` sees: where each token stood before the tokens were put in order.
    segments: a token sees those of its own segment.
    circular: the first chunk is the last one's neighbour.
    rounds: for several rounds of T segmentations that will be merged, each token's segment in all of them: (segment, chunk)
        as `round_ids` gives them. A pair that n rounds let see each other then has 1 / n of its weight in this one.
    """
    rows, length = q.shape[:2]
    fill = None if circular else NOBODY

    def own(x):
        return x.reshape(rows * (length // size), size, *x.shape[2:])

    def near(x, fill=None):
        x = windows(x, size, before, after, fill=fill)
        return x.reshape(rows * (length // size), *x.shape[2:])

    bias = None
    if rounds is not None:
        counts = _rounds_in_common(own(rounds), near(rounds), before, after)
        bias = biases.Dense(-jnp.log(jnp.maximum(counts, 1).astype(q.dtype))[:, None])
    out, lse = attend(
        own(q)[:, :, None],
        near(k)[:, :, None],
        near(v)[:, :, None],
        mask=mask,
        bias=bias,
        q_positions=own(positions),
        kv_positions=near(positions),
        segment_ids=(own(segments), near(segments, fill)),
        scale=scale,
        dropout=dropout,
        return_lse=True,
        implementation=implementation,
    )
    return out.reshape(rows, length, -1), lse.reshape(rows, length)


def _rounds_in_common(own: Int[Array, "R q T 2"], near: Int[Array, "R k T 2"], before: int, after: int) -> Int[Array, "R q k"]:
    """In how many rounds two tokens have one segment, in chunks that see each other."""
    counts = jnp.zeros((own.shape[0], own.shape[1], near.shape[1]), jnp.int32)
    for t in range(own.shape[2]):
        segment, chunk = ((own[:, :, None, t, i], near[:, None, :, t, i]) for i in range(2))
        distance = chunk[0] - chunk[1]
        counts += (segment[0] == segment[1]) & (distance <= before) & (distance >= -after)
    return counts


def lsh_attention(
    qk: Float[Array, "B L H D"],
    v: Float[Array, "B L H Dv"],
    buckets: Int[Array, "B H R L"],
    *,
    chunk_size: int,
    look_back: int = 1,
    look_ahead: int = 0,
    causal: bool = False,
    groups: Int[Array, "B L"] | None = None,
    across_buckets: bool = False,
    correct_duplicates: bool = True,
    dropout: Dropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "B L H Dv"]:
    """Reformer's attention (Kitaev et al. 2020, arXiv 2001.04451, section 2): see `reformer.Reformer` for the arguments.

    Tokens are sorted by (document, bucket, position) in each round and cut into chunks. A token sees those of its bucket in its
    chunk and the chunks beside it, j <= i where causal, and not itself, unless it sees nobody in any round. Scores are
    q . k / |k| with k = q. Rounds are merged by their log-sum-exp; with `correct_duplicates` a pair of n rounds counts 1 / n
    in each (appendix A, N_ij), which makes the result the softmax over the union of what the rounds see.
    """
    B, L, H, _ = qk.shape
    R = buckets.shape[2]
    pad = -L % chunk_size
    groups = jnp.zeros((B, L), jnp.int32) if groups is None else groups
    groups = jnp.broadcast_to(groups[:, None, None], buckets.shape).reshape(-1, L)
    order = jnp.lexsort((buckets.reshape(-1, L), groups), axis=-1).astype(jnp.int32)
    segments = segment_numbers(groups, None if across_buckets else buckets.reshape(-1, L), order)

    square = jnp.mean(qk.astype(jnp.promote_types(qk.dtype, jnp.float32)) ** 2, axis=-1, keepdims=True)
    k = (qk * jax.lax.rsqrt(qk.shape[-1] * (square + 1e-6))).astype(qk.dtype)
    back = jnp.argsort(order, axis=-1)
    rounds = _round_ids(segments, back, order, chunk_size, (B * H, R)) if correct_duplicates and R > 1 else None
    out, lse = window_attention(
        *(jnp.pad(sorted_rows(x, order), ((0, 0), (0, pad), (0, 0))) for x in (qk, k, v)),
        positions=jnp.pad(order, ((0, 0), (0, pad))),
        segments=jnp.pad(segments, ((0, 0), (0, pad)), constant_values=NOBODY + 1),
        mask=others(causal),
        size=chunk_size,
        before=look_back,
        after=look_ahead,
        rounds=None if rounds is None else jnp.pad(rounds, ((0, 0), (0, pad), (0, 0), (0, 0)), constant_values=NOBODY + 1),
        scale=1.0,
        dropout=dropout,
        implementation=implementation,
    )
    out, lse = merge_rounds(out, lse, back, (B, H, R))
    return jnp.where((lse == -jnp.inf)[..., None], v, out)


def sorted_rows(x: Float[Array, "B L H D"], order: Int[Array, "M L"]) -> Float[Array, "M L D"]:
    """Each head's tokens in the order of each round; rows are (B, H, R)."""
    rows = jnp.moveaxis(x, 2, 1).reshape(-1, *x.shape[1::2])
    return take(jnp.repeat(rows, len(order) // len(rows), axis=0), order)


def merge_rounds(
    out: Float[Array, "M N Dv"], lse: Float[Array, "M N"], places: Int[Array, "M L"], shape: tuple[int, int, int]
) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B L H"]]:
    """All rounds by their log-sum-exp; token i's part stands at `places[i]` of its row, and rows are (B, H, R) = shape."""
    out = jnp.moveaxis(take(out, places).reshape(*shape, places.shape[1], -1), (2, 3), (0, 2))
    lse = jnp.moveaxis(take(lse, places).reshape(*shape, places.shape[1]), (2, 3), (0, 2))
    return merge(list(zip(out, lse)))


def others(causal: bool) -> masks.Mask:
    """All positions, or all before the own one, and not the own one."""
    return masks.Causal() & ~masks.Band(0, 0) if causal else ~masks.Band(0, 0)


def segment_numbers(groups: Int[Array, "R L"], buckets: Int[Array, "R L"] | None, order: Int[Array, "R K"]) -> Int[Array, "R K"]:
    """Of tokens in this order: numbers that are equal where the groups are and, if there are any, the buckets."""
    starts = jnp.zeros(order.shape, bool)
    for ids in (groups, buckets):
        if ids is not None:
            ids = take(ids, order)
            starts = starts | jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def _round_ids(segments, back, order, chunk_size: int, shape: tuple[int, int]) -> Int[Array, "R N T 2"]:
    """(segment, chunk) of each sorted token in all rounds of its batch row and head; shape: (such rows, rounds)."""
    (rows, rounds), length = shape, order.shape[-1]
    ids = jnp.stack([take(segments, back), back // chunk_size], axis=-1).reshape(rows, rounds, length, 2)
    ids = jnp.broadcast_to(jnp.swapaxes(ids, 1, 2)[:, None], (rows, rounds, length, rounds, 2))
    return take(ids.reshape(rows * rounds, length, rounds, 2), order)
