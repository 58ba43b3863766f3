"""Keys and values of tokens already seen, in the `cache` collection: contiguous, a place for each token of each row; or paged.

Both hold them with heads first, so that what one head reads is contiguous. `of` declares the variables of a layer and returns
the layout as an object with `append`, which gives the positions of the new tokens, `read`, and `attend`, for one new token whose
keys are read where they lie.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.mixers.context import Context, Paging
from kernels import mesh
from kernels.attention import paged

BLOCK = 64
"""Tokens of a block where a contiguous cache is seen as blocks."""

Tokens = Float[Array, "B L G D"]


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """`cached_key` and `cached_value` [B, G, S, D], of rows of S slots."""

    keys: Any
    values: Any
    index: Any

    @property
    def slots(self) -> int:
        """S, of a row."""
        return self.keys.value.shape[2]

    def append(self, k: Tokens, v: Tokens, at: Int[Array, "B L"]) -> None:
        """Write a chunk to its positions `at`."""
        write = jax.vmap(lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (0, start, 0)))
        for cache, new in ((self.keys, k), (self.values, v)):
            cache.value = write(cache.value, jnp.swapaxes(new, 1, 2), at[:, 0])
        self.index.value = self.index.value + k.shape[1]

    def read(self) -> tuple[Float[Array, "B S G D"], Float[Array, "B S G Dv"]]:
        """Keys and values in order, also those of slots not written yet."""
        return jnp.swapaxes(self.keys.value, 1, 2), jnp.swapaxes(self.values.value, 1, 2)

    def attends_in_place(self, q: Float[Array, "B 1 H D"]) -> bool:
        """Whether `attend` would run a kernel, which is for programs of one device; otherwise it copies more than `read` does."""
        alone = mesh.shards((*mesh.ROWS, mesh.MODEL, mesh.SEQ)) == 1
        return self.slots % BLOCK == 0 and alone and paged.explain(*self._in_blocks(q)[:4]).name in paged.GPU_KERNELS

    def attend(self, q: Float[Array, "B 1 H D"], **options) -> Float[Array, "B 1 H Dv"]:
        """Causal attention of the newest token."""
        return paged.attend(*self._in_blocks(q), **options).reshape(*q.shape[:3], -1)

    def _in_blocks(self, q: Float[Array, "B 1 H D"]) -> tuple[Array, ...]:
        """The arguments of `paged.attend` to which each head of a row is a sequence, whose blocks follow one another."""
        B, G, slots, _ = self.keys.value.shape
        pools = (x.value.reshape(1, -1, BLOCK, x.value.shape[3]) for x in (self.keys, self.values))
        tables = jnp.arange(B * G * slots // BLOCK, dtype=jnp.int32).reshape(B * G, -1)
        return q.reshape(B * G, -1, q.shape[3]), *pools, tables, jnp.repeat(self.index.value, G)


@dataclasses.dataclass(frozen=True)
class Paged:
    """`key_blocks` and `value_blocks` [G, P, n, D] in the collection `blocks`: one pool for all rows, by their block tables."""

    keys: Any
    values: Any
    index: Any
    paging: Paging

    @property
    def slots(self) -> int:
        """S, of a row: what its table has room for."""
        return self.paging.tables.shape[1] * self.paging.block_size

    def append(self, k: Tokens, v: Tokens, at: Int[Array, "B L"]) -> None:
        """Write a chunk to its positions `at`. A row's table covers them; where it does not, to the last block that it names."""
        size, tables = self.paging.block_size, self.paging.tables
        blocks = jnp.take_along_axis(tables, jnp.minimum(at // size, tables.shape[1] - 1), axis=1)
        for pool, new in ((self.keys, k), (self.values, v)):
            pool.value = pool.value.at[:, blocks, at % size].set(jnp.moveaxis(new, 2, 0))
        self.index.value = self.index.value + k.shape[1]

    def read(self) -> tuple[Float[Array, "B S G D"], Float[Array, "B S G Dv"]]:
        """Keys and values in order; zeros in slots not written yet."""
        found = (paged.gather(pool.value, self.paging.tables, self.index.value) for pool in (self.keys, self.values))
        k, v = (jnp.moveaxis(x, 0, 2) for x in found)
        return k, v

    def attend(self, q: Float[Array, "B 1 H D"], **options) -> Float[Array, "B 1 H Dv"]:
        """Causal attention of the newest token."""
        pools = self.keys.value, self.values.value
        return paged.attend(q[:, 0], *pools, self.paging.tables, self.index.value, **options)[:, None]


def of(module: nn.Module, k: Tokens, v: Tokens, ctx: Context) -> Contiguous | Paged:
    """The layout that `ctx` asks for, of a layer whose rows are as long as k and v when it is initialised."""
    index = module.variable("cache", "cache_index", jnp.zeros, (k.shape[0],), jnp.int32)
    if ctx.paging is None:
        shapes = ((x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (k, v))
        names, collection = ("cached_key", "cached_value"), "cache"
    else:
        shapes = ((x.shape[2], ctx.paging.num_blocks, ctx.paging.block_size, x.shape[3]) for x in (k, v))
        names, collection = ("key_blocks", "value_blocks"), "blocks"
    stored = [module.variable(collection, name, jnp.zeros, shape, k.dtype) for name, shape in zip(names, shapes)]
    return Contiguous(*stored, index) if ctx.paging is None else Paged(*stored, index, ctx.paging)
