"""From x' = A x + B u to x_k = A_bar x_{k-1} + B_bar u_k: a step of Delta units of time in which u is u_k.

Of diagonal systems the logarithm of A_bar is returned, because powers A_bar^l are most precise as exp(l log A_bar); zero-order
hold has it without rounding A_bar first.
"""

from collections.abc import Callable

import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Complex, Float, Inexact

SMALLEST = 1e-20
"""The |A_bar| that takes the place of an exact zero, whose logarithm there is not."""


def zoh(Lambda: Complex[Array, "*n"], Delta: Float[Array, "*n"]) -> tuple[Complex[Array, "*n"], Complex[Array, "*n"]]:
    """Zero-order hold (Smith et al. 2023, eq. 6; Gu et al. 2022, S4D, section 3.1), exact where u is constant over the step.

    Returns log A_bar = Lambda Delta and the gain B_bar / B = Lambda^-1 (A_bar - 1), which tends to Delta as Lambda Delta -> 0.
    """
    z = Lambda * Delta
    is_tiny = jnp.abs(z) < 1e-6
    safe = jnp.where(is_tiny, 1.0, z)
    return z, Delta * jnp.where(is_tiny, 1.0 + z / 2, jnp.expm1(safe) / safe)


def bilinear(Lambda: Complex[Array, "*n"], Delta: Float[Array, "*n"]) -> tuple[Complex[Array, "*n"], Complex[Array, "*n"]]:
    """The bilinear transform, Tustin's (Gu et al. 2022, S4, eq. 3): A_bar = (1 + z/2) / (1 - z/2) with z = Lambda Delta.

    Returns log A_bar and the gain B_bar / B = Delta / (1 - z/2).
    """
    z = Lambda * Delta
    A_bar = (1 + z / 2) / (1 - z / 2)
    A_bar = jnp.where(jnp.abs(A_bar) < SMALLEST, SMALLEST, A_bar)
    return jnp.log(A_bar), Delta / (1 - z / 2)


DISCRETISATIONS: dict[str, Callable] = {"zoh": zoh, "bilinear": bilinear}


def dense_zoh(
    A: Inexact[Array, "n n"], B: Inexact[Array, "n"], Delta: float | Float[Array, ""]
) -> tuple[Inexact[Array, "n n"], Inexact[Array, "n"]]:
    """Zero-order hold of a dense system: exp of the block matrix [[A, B], [0, 0]] Delta is [[A_bar, B_bar], [0, 1]]."""
    n = A.shape[0]
    block = jnp.zeros((n + 1, n + 1), A.dtype).at[:n, :n].set(A).at[:n, n].set(B)
    both = jax.scipy.linalg.expm(block * Delta)
    return both[:n, :n], both[:n, n]


def dense_bilinear(
    A: Inexact[Array, "n n"], B: Inexact[Array, "n"], Delta: float | Float[Array, ""], alpha: float = 0.5
) -> tuple[Inexact[Array, "n n"], Inexact[Array, "n"]]:
    """The generalised bilinear transform of a dense system (Gu et al. 2020, appendix B.3).

    A_bar = (I - alpha Delta A)^-1 (I + (1 - alpha) Delta A), B_bar = (I - alpha Delta A)^-1 Delta B. `alpha` is 0 for Euler's
    method, 1/2 for the bilinear one, 1 for backward Euler.
    """
    eye = jnp.eye(A.shape[0], dtype=A.dtype)
    right = jnp.concatenate([eye + (1 - alpha) * Delta * A, Delta * B[:, None]], axis=1)
    both = jnp.linalg.solve(eye - alpha * Delta * A, right)
    return both[:, :-1], both[:, -1]
