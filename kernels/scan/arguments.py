"""Checks that the entries of all scans share: what an argument is, before anything looks at its shape."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from kernels.dispatch import shown


def check_arrays(op: str, required: Mapping[str, Any], optional: Mapping[str, Any], kind: type = jnp.floating) -> None:
    """Raise `ValueError`, naming `op` and the argument, for what is no array of a type of `kind`; optional ones may be None."""
    wanted = "real or complex floating-point numbers" if kind is jnp.inexact else "floating-point numbers"
    for name, x in {**required, **optional}.items():
        if x is None and name in optional:
            continue
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(f"{op}: {name} is {type(x).__name__}; an array of {wanted} is expected")
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(f"{op}: {name} is {x.dtype}; {wanted} are expected, e.g. {name}.astype(jnp.float32)")


def check_shape(op: str, name: str, x: Any, shape: tuple[int, ...], given: str) -> None:
    """Raise `ValueError` where `x` is there and not of `shape`; `given` names the argument that decides it, and its shape."""
    if x is not None and x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {x.shape}; for {given} it must be {shape}")


def check_direction(op: str, reset: Any, reverse: Any, rows: tuple[int, int], given: str) -> None:
    """Raise `ValueError` for a `reset` that is no boolean array [B, L], or a `reverse` that is no bool."""
    if not isinstance(reverse, bool):
        raise ValueError(f"{op}: reverse={shown(reverse)}; True or False is expected, known before tracing")
    if reset is None:
        return
    if not hasattr(reset, "dtype") or reset.dtype != bool:
        raise ValueError(f"{op}: reset is {getattr(reset, 'dtype', type(reset).__name__)}; a boolean array {rows} is expected")
    check_shape(op, "reset", reset, rows, given)
