"""The forward kernel: one program for each row of tiles of each head, an online softmax over the tiles of the row.

FlashAttention-2, algorithm 1 (Dao 2023): the outer loop over query blocks (line 3) is the grid, so that programs share nothing;
the inner one over key blocks (line 6) walks the row's list. Lines cited below are that algorithm's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.attention.call import Call, statistics_dtype
from kernels.attention.portable import lists
from kernels.attention.portable.tile import Tile, dot, launch, walk
from kernels.attention.portable.tiling import Tiling, pad


def forward(tiling: Tiling, call: Call) -> tuple[Float[Array, "B L H Dv"], Float[Array, "B H L"]]:
    """The output, and the log-sum-exp of each row of scores (-inf for rows without an allowed pair)."""
    results = run_forward(tiling, call)
    L, Dv = tiling.L, call.v.shape[3]
    return results["out"][:, :L, :, :Dv], results["lse"][:, :, :L]


def run_forward(tiling: Tiling, call: Call) -> dict[str, Array]:
    """The kernel's outputs, padded: `out` and `lse`, and `visits` [B, H, rows], the tiles that each program visited."""
    padded, listed = pad(call, tiling), lists.by_row(call, tiling)
    (B, L, H, _), Dv = padded.q.shape, padded.v.shape[3]
    out_shape = {
        "out": jax.ShapeDtypeStruct((B, L, H, Dv), call.q.dtype),
        "lse": jax.ShapeDtypeStruct((B, H, L), statistics_dtype(call.q.dtype)),
        "visits": jax.ShapeDtypeStruct((B, H, tiling.rows), jnp.int32),
    }
    return launch(functools.partial(_kernel, tiling), "forward", tiling, (tiling.rows, H, B), out_shape, padded, listed)


def _kernel(tiling: Tiling, call: Call, listed: lists.Lists, outputs):
    row, head, b = (pl.program_id(axis) for axis in range(3))
    of_row = Tile(tiling, call, listed.stored, b, head, row, 0, None, False)
    q = of_row.of_queries(call.q)
    dtype = statistics_dtype(q.dtype)

    def visit(carry, column, pattern, tested):
        m, l, acc = carry
        tile = Tile(tiling, call, listed.stored, b, head, row, column, pattern, tested)
        k, v = tile.of_keys(call.k), tile.of_keys(call.v)
        s = tile.transform(tile.products(q, k), tile.bias_tile())  # line 8
        m_new = jnp.maximum(m, s.max(axis=1))  # line 9
        shift = jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp(s - shift[:, None])
        rescale = jnp.exp(m - shift)
        l = rescale * l + p.sum(axis=1)
        pv = dot((p * tile.dropout()).astype(v.dtype), v, (1, 0))
        return m_new, l, rescale[:, None] * acc + pv  # line 10

    m, l = jnp.full((tiling.q_tile,), -jnp.inf, dtype), jnp.zeros((tiling.q_tile,), dtype)
    acc = jnp.zeros((tiling.q_tile, call.v.shape[3]), dtype)
    (m, l, acc), count = walk(listed, b, head, row, visit, (m, l, acc))
    l_or_one = jnp.where(l == 0, 1, l)
    outputs["out"][b, of_row.rows, head, :] = (acc / l_or_one[:, None]).astype(q.dtype)  # line 12
    outputs["lse"][b, head, of_row.rows] = jnp.where(l == 0, -jnp.inf, m + jnp.log(l_or_one))  # line 13
    outputs["visits"][b, head, row] = count
