"""Attention of one query a sequence to keys and values that lie in blocks anywhere in a pool (PagedAttention).

Kwon et al. 2023 (arXiv 2309.06180, section 4.1, eq. 4): key j of a sequence is in place j mod n of block table[j // n], and the
sum over keys runs over blocks. The pool is [G, P, n, D], so that what a program reads of a block is contiguous. Forward only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from kernels import compat, devices
from kernels.attention.call import check_scores, statistics_dtype
from kernels.attention.merge import merge
from kernels.attention.mosaic import decode
from kernels.attention.portable.tile import dot
from kernels.attention.portable.tiling import power_of_two
from kernels.dispatch import Choice, Implementation, anything, choose

KEYS = 64
"""Keys that a program of the kernel takes at a time, where a block is smaller: several blocks."""

PROGRAMS = 264
"""Programs that the kernel is split into if there are not as many sequences and heads: two for each processor of an H200."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static facts of a call."""

    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    block_size: int
    table_width: int
    dtype: str
    platform: str


def attend(
    q: Float[Array, "B H D"],
    k_blocks: Float[Array, "G P n D"],
    v_blocks: Float[Array, "G P n Dv"],
    tables: Int[Array, "B N"],
    lengths: Int[Array, "B"],
    *,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B H Dv"] | tuple[Float[Array, "B H Dv"], Float[Array, "B H"]]:
    """softmax(softcap(scale q k^T)) v over the first `lengths` keys of each sequence.

    Args:
      q, k_blocks, v_blocks: of one float type. Head h of H queries reads head h // (H / G) of G keys and values.
      tables: the blocks of each sequence in order; what is beyond its length may be any block of the pool.
      lengths: keys of each sequence, at most N n. A sequence of none gives zeros, and a log-sum-exp of -inf.
      softcap: c in c tanh(score / c). scale: None is 1 / sqrt(D).
      return_lse: also the log-sum-exp of each row of scores, so that other keys can be merged (`kernels.attention.merge`).
      implementation: a name in `IMPLEMENTATIONS`, or None for the first in `PREFERENCE` that can; see `explain`.

    Raises:
      ValueError: an argument does not fit the others, or the named implementation cannot run this call.
    """
    _check(q, k_blocks, v_blocks, tables, lengths)
    check_scores("paged.attend", softcap, scale)
    choice = explain(q, k_blocks, v_blocks, tables, implementation=implementation)
    scale = float(q.shape[2] ** -0.5 if scale is None else scale)
    run = IMPLEMENTATIONS[choice.name].run
    out, lse = run(q, k_blocks, v_blocks, tables, lengths, softcap=softcap, scale=scale)
    return (out, lse) if return_lse else out


def explain(q, k_blocks, v_blocks, tables, *, implementation: str | None = None) -> Choice:
    """Which implementation `attend` would run for these arguments (arrays or `jax.ShapeDtypeStruct`s), and why."""
    (B, H, D), (G, _, n, _) = q.shape, k_blocks.shape
    spec = Spec(B, H, G, D, v_blocks.shape[3], n, tables.shape[1], str(q.dtype), jax.default_backend())
    return choose("paged.attend", IMPLEMENTATIONS, preference(spec.platform), spec, implementation)


def gather(
    blocks: Float[Array, "G P n D"], tables: Int[Array, "B N"], lengths: Int[Array, "B"]
) -> Float[Array, "G B S D"]:  # fmt: skip
    """The rows of a pool that each sequence's table lists, in order, and zeros beyond its length; S = N n.

    What is beyond the length is another sequence's or nobody's, and may be NaN, which a weight of 0 would not take out.
    """
    (G, _, n, D), (B, N) = blocks.shape, tables.shape
    rows = jnp.take(blocks, tables, axis=1, mode="clip").reshape(G, B, N * n, D)
    return jnp.where(_is_key(lengths, N * n)[None, ..., None], rows, 0)


def _is_key(lengths: Int[Array, "B"], slots: int) -> Bool[Array, "B S"]:
    return jnp.arange(slots)[None] < lengths[:, None]


def reference(q, k_blocks, v_blocks, tables, lengths, *, softcap, scale):
    """The specification: keys and values gathered by the tables, and dense scores with float32 statistics."""
    (B, H, D), G = q.shape, k_blocks.shape[0]
    dtype = statistics_dtype(q.dtype)
    k, v = gather(k_blocks, tables, lengths), gather(v_blocks, tables, lengths)
    grouped = jnp.moveaxis(q.reshape(B, G, H // G, D), 1, 0)
    s = scale * jnp.einsum("gbrd,gbsd->gbrs", grouped, k, precision="highest", preferred_element_type=dtype)
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    s = jnp.where(_is_key(lengths, k.shape[2])[None, :, None], s, -jnp.inf)
    m = s.max(axis=-1, keepdims=True)
    m = jnp.where(m == -jnp.inf, 0, m)
    p = jnp.exp(s - m)
    total = p.sum(axis=-1, keepdims=True)
    is_empty = total == 0
    total = jnp.where(is_empty, 1, total)
    lse = jnp.where(is_empty, -jnp.inf, m + jnp.log(total))[..., 0]
    out = jnp.einsum("gbrs,gbsd->gbrd", p, v.astype(dtype), precision="highest") / total
    out, lse = (jnp.moveaxis(x, 0, 1) for x in (out, lse))
    return out.reshape(B, H, -1).astype(q.dtype), lse.reshape(B, H)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernel is cut.

    Each program takes `steps` times `width` blocks of one sequence for the queries of one key/value head; there are `splits`
    programs for these, whose results are merged (split-K, Flash-Decoding).
    """

    width: int
    steps: int
    splits: int
    softcap: float | None
    scale: float
    interpret: bool


def plan(
    spec: Spec, *, softcap: float | None, scale: float, splits: int | None = None, interpret: bool | None = None
) -> Plan:  # fmt: skip
    """The cut of a call; `splits`: into so many, if there are as many tiles."""
    width = min(max(1, KEYS // spec.block_size), 1 << (spec.table_width - 1).bit_length())
    tiles = -(-spec.table_width // width)
    wanted = -(-PROGRAMS // (spec.sequences * spec.kv_heads)) if splits is None else splits
    steps = -(-tiles // min(wanted, tiles))
    interpret = spec.platform == "cpu" if interpret is None else interpret
    return Plan(width, steps, -(-tiles // steps), softcap, scale, interpret)


def portable(q, k_blocks, v_blocks, tables, lengths, *, softcap, scale, splits: int | None = None, interpret: bool | None = None):
    """The Pallas kernel: an online softmax over the blocks that a sequence's table lists, read where they lie."""
    (B, H, D), (G, _, n, Dv) = q.shape, v_blocks.shape
    spec = Spec(B, H, G, D, Dv, n, tables.shape[1], str(q.dtype), jax.default_backend())
    cut = plan(spec, softcap=softcap, scale=scale, splits=splits, interpret=interpret)
    rows, dtype = power_of_two(H // G), statistics_dtype(q.dtype)
    grouped = jnp.pad(q.reshape(B, G, H // G, D), ((0, 0), (0, 0), (0, rows - H // G), (0, 0)))
    width = cut.width * cut.steps * cut.splits
    tables = jnp.pad(tables, ((0, 0), (0, width - tables.shape[1])))
    out_shape = [
        jax.ShapeDtypeStruct((cut.splits, B, G, rows, Dv), dtype),
        jax.ShapeDtypeStruct((cut.splits, B, G, rows), dtype),
    ]
    out, lse = pl.pallas_call(
        functools.partial(_kernel, cut),
        out_shape,
        grid=(cut.splits, G, B),
        compiler_params=compat.triton_params(4, 2),
        interpret=cut.interpret,
        name="attention_paged",
    )(grouped, k_blocks, v_blocks, tables.astype(jnp.int32), lengths.astype(jnp.int32))
    parts = [
        (out[i, :, None, :, : H // G].reshape(B, 1, H, Dv), lse[i, ..., : H // G].reshape(B, 1, H)) for i in range(cut.splits)
    ]
    out, lse = merge(parts) if cut.splits > 1 else parts[0]
    return out[:, 0].astype(q.dtype), lse[:, 0]


def _kernel(cut: Plan, q_ref, k_ref, v_ref, tables_ref, lengths_ref, out_ref, lse_ref):
    split, g, b = (pl.program_id(axis) for axis in range(3))
    q, length = q_ref[b, g, :, :], lengths_ref[b]
    tile = cut.width * k_ref.shape[2]
    dtype = statistics_dtype(q.dtype)

    def read(ref, t):
        blocks = tables_ref[b, pl.ds(t * cut.width, cut.width)]
        return ref[g, blocks, :, :].reshape(tile, ref.shape[3])

    def visit(t, carry):
        m, l, acc = carry
        s = cut.scale * dot(q, read(k_ref, t), (1, 1))
        if cut.softcap is not None:
            s = cut.softcap * jnp.tanh(s / cut.softcap)
        is_key = t * tile + lax.iota(jnp.int32, tile) < length
        s = jnp.where(is_key[None], s, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=1))
        shift = jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp(s - shift[:, None])
        rescale = jnp.exp(m - shift)
        v = jnp.where(is_key[:, None], read(v_ref, t), 0)
        return m_new, rescale * l + p.sum(axis=1), rescale[:, None] * acc + dot(p.astype(v.dtype), v, (1, 0))

    start = split * cut.steps
    end = jnp.minimum(start + cut.steps, lax.div(length + (tile - 1), jnp.int32(tile)))
    rows = q.shape[0]
    state = jnp.full((rows,), -jnp.inf, dtype), jnp.zeros((rows,), dtype), jnp.zeros((rows, v_ref.shape[3]), dtype)
    m, l, acc = lax.fori_loop(start, end, visit, state)
    l_or_one = jnp.where(l == 0, 1, l)
    out_ref[split, b, g, :, :] = acc / l_or_one[:, None]
    lse_ref[split, b, g, :] = jnp.where(l == 0, -jnp.inf, m + jnp.log(l_or_one))


def why_not(spec: Spec) -> str | None:
    """The reason the kernel cannot run this call."""
    on_gpu, sizes = spec.platform != "cpu", (spec.head_dim, spec.v_head_dim)
    reasons = {
        f"it is written for NVIDIA GPUs, and interpreted on cpu, not for {spec.platform}": spec.platform not in ("cpu", "gpu"),
        f"on a GPU blocks must hold a power of two of tokens, not {spec.block_size}": (
            on_gpu and bool(spec.block_size & (spec.block_size - 1))
        ),
        f"on a GPU head sizes must be powers of two from 16 to 256, not {sizes[0]} and {sizes[1]}": (
            on_gpu and any(size & (size - 1) or not 16 <= size <= 256 for size in sizes)
        ),
        "on a GPU it has no float64": on_gpu and spec.dtype == "float64",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


IMPLEMENTATIONS = {
    "reference": Implementation(reference, anything, "XLA: keys and values gathered by the tables, then dense scores"),
    "portable": Implementation(portable, why_not, "a Pallas kernel that reads blocks in place, interpreted on a CPU"),
    "mosaic": Implementation(
        decode.attend_blocks, decode.why_not_blocks, "a Pallas Mosaic GPU kernel for Hopper, interpreted on a CPU"
    ),
}
PREFERENCE = ("reference",)
GPU_KERNELS = ("mosaic", "portable")
"""From the fastest: what comes first on a GPU, each where its numerics have been checked on such a device."""


def preference(platform: str) -> tuple[str, ...]:
    """The implementations that may run without being asked for, from the fastest."""
    checked = devices.verified("paged.attend", devices.here()) if platform == "gpu" else ()
    return (*(name for name in GPU_KERNELS if name in checked), *PREFERENCE)


def _check(q, k_blocks, v_blocks, tables, lengths) -> None:
    (B, H, D), (G, P, n, _) = q.shape, k_blocks.shape
    shapes = f"q {q.shape}, k_blocks {k_blocks.shape}, v_blocks {v_blocks.shape}"
    if k_blocks.shape[3] != D or v_blocks.shape[:3] != (G, P, n) or not G or H % G:
        raise ValueError(
            f"paged.attend: {shapes}: give [B, H, D], [G, P, n, D] and [G, P, n, Dv] with H a multiple of G"
        )  # fmt: skip
    if not (q.dtype == k_blocks.dtype == v_blocks.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"paged.attend: q {q.dtype}, k {k_blocks.dtype}, v {v_blocks.dtype}: all three must have one floating type"
        )
    for name, array, shape in (("tables", tables, (B, tables.shape[1])), ("lengths", lengths, (B,))):
        if array.shape != shape or 0 in shape or not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"paged.attend: {name} is {array.dtype} {array.shape}; integers are expected, a row a sequence")
