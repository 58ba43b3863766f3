"""The gradient of a linear recurrence, which is the recurrence run backwards; it serves every fast implementation.

For h_t = a_t h_{t-1} + b_t and g = dloss/dh, with lambda_t the total derivative of the loss by h_t,

    lambda_t = g_t + a_{t+1} lambda_{t+1},      db_t = lambda_t,      da_t = lambda_t h_{t-1},      dh0 = a_1 lambda_1

(S5, Smith et al. 2023, differentiates through its scan; the closed form is that of Martin & Cundy 2018, section 3). There is
no complex conjugate: every map here is holomorphic, and JAX's cotangents multiply by the plain derivative.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.scan.reference import gate


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_with_adjoint(scan: Callable, reverse: bool, a, b, h0, reset):
    """`scan(gate(a, reset), b, h0)`, whose gradient keeps `a`, `h`, `h0`, `reset` and nothing else."""
    return scan(gate(a, reset, reverse), b, h0, reverse=reverse)


def _forward(scan, reverse, a, b, h0, reset):
    h = scan_with_adjoint(scan, reverse, a, b, h0, reset)
    return h, (a, h, h0, reset)


def _backward(scan, reverse, residuals, g):
    a, h, h0, reset = residuals
    gated = gate(a, reset, reverse)
    adjoint = scan(_next(gated, reverse), g, jnp.zeros_like(h0), reverse=not reverse)
    previous = jnp.concatenate([h[:, 1:], h0[:, None]] if reverse else [h0[:, None], h[:, :-1]], axis=1)
    da = gate(adjoint * previous, reset, reverse)
    if a.ndim == 1:
        da = da.sum(axis=1).sum(axis=0)  # in two stages: shorter float32 sums
    first = -1 if reverse else 0
    dh0 = (gated[:, first] if gated.ndim == 3 else gated[None]) * adjoint[:, first]
    return da, adjoint, dh0, None


def _next(a, reverse: bool):
    """a_{t+1} at position t (a_{t-1} where the scan itself ran in reverse); the last one meets a zero state."""
    if a.ndim == 1:
        return a
    return jnp.roll(a, 1 if reverse else -1, axis=1)


scan_with_adjoint.defvjp(_forward, _backward)
