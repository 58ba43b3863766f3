"""The scans on a mesh: each device's rows and channels, and its stretch of a sequence that is spread over the axis seq.

A recurrence is affine in the state it starts from: a stretch that starts from h ends in P h + h_last, P being the product of its
decays and h_last what it makes of nothing. So every device runs its stretch from zero, all exchange (P, h_last), each combines
those of the stretches before its own into the state it really starts from, and runs again from there (the scan of Blelloch 1990
over devices). Two scans of L / n steps in place of one of L; memory, forward and backward, is that of a stretch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from kernels import mesh
from kernels.dispatch import Choice

Arrays = Mapping[str, Any]


def is_split() -> bool:
    """Whether there is a mesh to spread a scan over."""
    return mesh.shards((*mesh.ROWS, mesh.SEQ, mesh.MODEL)) > 1


def stretches(length: int) -> int:
    """Over how many devices a sequence of this length is spread: those along seq, if they divide it."""
    n = mesh.shards(mesh.SEQ)
    return n if length % n == 0 else 1


def told(choice: Choice, length: int) -> Choice:
    """`choice`, which also says over how many devices the scan is spread."""
    n, seq = stretches(length), mesh.shards(mesh.SEQ)
    if seq == 1:
        return choice
    spread = f"in {n} stretches, whose carries are combined" if n > 1 else f"whole on each device: {seq} do not divide {length}"
    return dataclasses.replace(choice, reason=f"{choice.reason}; {spread}")


def scan(
    run: Callable[..., tuple[Any, Any]],
    decay: Callable[[Arrays], Any],
    arrays: Arrays,
    axes: Mapping[str, str],
    h0: Any,
    state_axes: str,
    *,
    reverse: bool,
) -> tuple[Any, Any]:
    """`run(**arrays, h0=h0)` -> (y, h_last) on the mesh.

    Args:
      decay: arrays -> what is left of a state after all their steps, boundaries of documents apart; it broadcasts to h0.
      axes, state_axes: for each array a letter for each of its axes: B rows, L positions, M what the model axis splits (they
        are all split or none), and - for what stays whole; y has those of the first array.
      h0: the state to start from. arrays["reset"] [B, L], if there is one, lets no state cross the start of a document.
    """
    first = next(iter(arrays))
    sizes: dict[str, int] = {}
    for name, x in {**arrays, "h0": h0}.items():
        for letter, n in zip(axes.get(name, state_axes), () if x is None else x.shape):
            sizes[letter] = min(sizes.get(letter, n), n)
    where = {"B": mesh.along(sizes["B"], mesh.ROWS), "M": mesh.along(sizes.get("M", 1), mesh.MODEL)}
    n = stretches(sizes["L"])
    where["L"] = mesh.SEQ if n > 1 else None

    def lay(letters):
        return P(*(where.get(letter) for letter in letters))

    specs = {name: None if x is None else lay(axes[name]) for name, x in arrays.items()}

    def local(arrays, h0):
        if n == 1:
            return run(**arrays, h0=h0)
        h0 = _carry(run, decay, arrays, h0, n, reverse)
        y, last = run(**arrays, h0=h0)
        is_end = lax.axis_index(mesh.SEQ) == (0 if reverse else n - 1)
        return y, lax.psum(jnp.where(is_end, last, 0), mesh.SEQ)

    mapped = mesh.map_shards(local, (specs, lay(state_axes)), (specs[first], lay(state_axes)))
    return mapped(dict(arrays), h0)


def _carry(run, decay, arrays: Arrays, h0, n: int, reverse: bool):
    """The state that enters this device's stretch."""
    _, last = run(**arrays, h0=jnp.zeros_like(h0))
    product = jnp.broadcast_to(decay(arrays), h0.shape).astype(h0.dtype)
    reset = arrays.get("reset")
    if reset is not None:
        inside, leaving = (reset[:, 1:], reset[:, 0]) if reverse else (reset, None)
        product = _drop(product, jnp.any(inside, axis=1))
        if leaving is not None:  # in reverse, what stands at a start does not pass to the stretch before it
            product, last = _drop(product, leaving), _drop(last, leaving)
    products, lasts = lax.all_gather((product, last), mesh.SEQ)
    h, entering = h0, [h0] * n
    for i in reversed(range(n)) if reverse else range(n):
        entering[i] = h
        h = products[i] * h + lasts[i]
    return jnp.stack(entering)[lax.axis_index(mesh.SEQ)]


def _drop(state, where: jax.Array):
    """`state` [B, ...] with zeros in the rows `where` [B]."""
    return jnp.where(where.reshape(-1, *[1] * (state.ndim - 1)), 0, state)
