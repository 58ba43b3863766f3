"""What a warpgroup does that JAX's interpreter of Mosaic GPU kernels cannot: tensor-core products, and layouts in registers.

A kernel is the same code on a GPU and interpreted on a CPU: copies, barriers, warpgroups, the walk over tiles and all of the
softmax. These few operations alone come in two forms, because the interpreter has no product whose left side is in registers, on
JAX 0.10 no transposed reference, and no layouts. So what interpretation leaves unproven is here: wgmma itself and its layouts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import compat


class Hopper:
    """A warpgroup of a GPU of compute capability 9.0. Matrices are spread over its registers as wgmma leaves its results."""

    matrix, vector, across = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def full(self, shape: tuple[int, ...], value: float | jax.Array) -> jax.Array:
        """A float32 matrix, or a vector along its rows."""
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), self.matrix if len(shape) == 2 else self.vector)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """The index of each element along `axis`; of a vector first, which takes fewer registers than a matrix."""
        vector = plgpu.broadcasted_iota(jnp.int32, shape[axis : axis + 1], 0, layout=self.across if axis else self.vector)
        return lax.broadcast_in_dim(vector, shape, [axis])

    def load(self, ref, axis: int) -> jax.Array:
        """A vector from shared memory, along the rows (axis 0) or the columns (axis 1) of a matrix."""
        return compat.mosaic_load(ref, self.across if axis else self.vector)

    def load_matrix(self, ref, dtype) -> jax.Array:
        """A matrix from shared memory, in another type."""
        return compat.mosaic_load(ref, self.matrix).astype(dtype)

    def product(self, a, b) -> jax.Array:
        """a b^T in float32, of references to shared memory."""

        def multiply(total):
            plgpu.wgmma(total, a, compat.mosaic_transposed(b))
            return total[...]

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def product_and_sum(self, a, b, total: jax.Array, c: jax.Array, d) -> tuple[jax.Array, jax.Array]:
        """a b^T and total + c d, for c in registers, one right behind the other on the tensor cores."""

        def multiply(products):
            plgpu.wgmma(products, a, compat.mosaic_transposed(b))
            summed = self.add_product(total, c, d)
            return products[...], summed

        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def add_transposed(self, total: jax.Array, a, b) -> jax.Array:
        """total + a b^T, of references to shared memory."""
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, compat.mosaic_transposed(b)))(plgpu.ACC.init(total))

    def add_product(self, total: jax.Array, a: jax.Array, b) -> jax.Array:
        """total + a b, for a in registers and b a reference to shared memory."""
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))

    copiers = 4
    """The warps of a warpgroup."""

    def copy_by_share(self, work: Callable[[Any], None]) -> None:
        """Run `work(number)` in each warp by itself: many small copies start sooner than if all warps started each."""
        plgpu.warp_map(work)

    def registers(self, number: int, action: str) -> None:
        """Set how many registers each thread of this warpgroup may have."""
        plgpu.set_max_registers(number, action=action)


class Interpreted:
    """The same on arrays."""

    def full(self, shape, value):
        return jnp.full(shape, value, jnp.float32)

    def iota(self, shape, axis):
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def load(self, ref, axis):
        return ref[...]

    def load_matrix(self, ref, dtype):
        return ref[...].astype(dtype)

    def product(self, a, b):
        return _dot(a[...], b[...], 1)

    def product_and_sum(self, a, b, total, c, d):
        return self.product(a, b), self.add_product(total, c, d)

    def add_transposed(self, total, a, b):
        return total + _dot(a[...], b[...], 1)

    def add_product(self, total, a, b):
        return total + _dot(a, b[...], 0)

    copiers = 1

    def copy_by_share(self, work):
        work(0)

    def registers(self, number, action):
        pass


def machine(interpret: bool) -> Hopper | Interpreted:
    return Interpreted() if interpret else Hopper()


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32)
