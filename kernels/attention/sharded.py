"""One attention call on a mesh: which rows, heads and positions each device has, and its own program for them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels import mesh
from kernels.attention.call import Call
from kernels.attention.masks import of_heads
from kernels.attention.merge import Part


def attend(run: Callable[[Call], Part], call: Call, *, sequence: bool = False) -> Part:
    """`run` on each device's rows and heads of the call, where the mesh divides them evenly; a copy of the rest on each.

    The loops inside an implementation are no work for the partitioner. sequence: the arrays are also split along L and S, over
    the axis seq; `run` is then told of the stretch it has alone.
    """
    specs = _specs(call, sequence)

    def local(call):
        if call.dropout is not None:
            origin = [_first(specs.q[0], call.q.shape[0]), _first(specs.q[2], call.q.shape[2]), 0, 0]
            call = dataclasses.replace(call, dropout=call.dropout.at(jnp.stack([jnp.uint32(start) for start in origin])))
        return run(call)

    return mesh.map_shards(local, (specs,), (specs.q, P(*specs.q[:3])))(call)


def _specs(call: Call, sequence: bool) -> Call:
    """The `PartitionSpec` of each array of the call."""
    (B, _, H, _), G = call.q.shape, call.k.shape[2]
    heads = mesh.along(G, mesh.MODEL) if len(of_heads(call.mask)) == 1 and H % G == 0 else None
    where = {"B": mesh.along(B, mesh.ROWS), "H": heads}
    where |= dict.fromkeys("LS", mesh.SEQ if sequence else None)

    def lay(x, axes):
        return None if x is None else P(*(where.get(name) if size > 1 else None for name, size in zip(axes, x.shape)))

    leaves, structure = jax.tree.flatten(call.bias)
    axes = [] if call.bias is None else call.bias.axes()
    return dataclasses.replace(
        call,
        q=P(where["B"], where["L"], heads, None),
        k=P(where["B"], where["S"], heads, None),
        v=P(where["B"], where["S"], heads, None),
        bias=jax.tree.unflatten(structure, [lay(leaf, at) for leaf, at in zip(leaves, axes, strict=True)]),
        q_segments=lay(call.q_segments, "BL"),
        kv_segments=lay(call.kv_segments, "BS"),
        q_positions=lay(call.q_positions, "BL"),
        kv_positions=lay(call.kv_positions, "BS"),
        dropout=None if call.dropout is None else jax.tree.map(lambda x: P(), call.dropout),
    )


def _first(axes: mesh.Axes | None, size: int):
    """The first of this device's `size` indices along an array's axis that lies along `axes` of the mesh."""
    return 0 if axes is None else lax.axis_index(axes) * size
