"""S4D: a diagonal state-space model for each channel (Gu, Gupta, Goel & Ré 2022, arXiv 2206.11893)."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from efficient_attn.arguments import lookup
from efficient_attn.mixers.ssm.discretise import DISCRETISATIONS
from efficient_attn.mixers.ssm.hippo import dplr
from efficient_attn.mixers.ssm.paired import PairedStateSpace
from efficient_attn.mixers.ssm.systems import Diagonal

Initial = tuple[np.ndarray, np.ndarray]
"""Lambda [N/2] and B [N/2]: one of each conjugate pair."""


def lin(N: int) -> Initial:
    """S4D-Lin (eq. 9): Lambda_n = -1/2 + i pi n, B = 1."""
    return -0.5 + 1j * np.pi * np.arange(N // 2), np.ones(N // 2)


def inv(N: int) -> Initial:
    """S4D-Inv (eq. 8): Lambda_n = -1/2 + i N/pi (N / (2n + 1) - 1), B = 1."""
    return -0.5 + 1j * N / np.pi * (N / (2 * np.arange(N // 2) + 1) - 1), np.ones(N // 2)


def real(N: int) -> Initial:
    """S4D-Real: Lambda_n = -(n + 1), as HiPPO-LegS itself has, B = 1. Imaginary parts train from 0, as in the released code."""
    return -(np.arange(N // 2) + 1.0) + 0j, np.ones(N // 2)


def legs(N: int) -> Initial:
    """S4D-LegS (section 4.1): HiPPO-LegS without its low-rank part. B as in the released code, twice what theorem 3 says."""
    Lambda, _, B, _ = dplr("legs", N)
    return Lambda, B


INITS: Mapping[str, Callable[[int], Initial]] = {"lin": lin, "inv": inv, "real": real, "legs": legs}


class S4D(PairedStateSpace):
    """x_k = A_bar x_{k-1} + B_bar u_k, y_k = 2 Re(C x_k) + D u_k for each channel, A diagonal.

    A_init: one of `INITS`.
    discretisation: one of `DISCRETISATIONS`.
    bandlimit: alpha: modes that turn faster than alpha / 2 cycles a step of training are left out, so that kernels are smooth
        enough for other sampling rates (Nguyen et al. 2022, S4ND, section 3.3). 0: none are.
    rate: the sampling interval of the input over that of training; it multiplies Delta.

    See `PairedStateSpace` and `FeatureStateSpace` for the other fields.
    """

    A_init: str = "legs"
    discretisation: str = "zoh"
    bandlimit: float = 0.0
    rate: float = 1.0

    @nn.compact
    def systems(self, width: int) -> tuple[Diagonal, ...]:
        Lambda, B = self.initial(INITS, self.A_init)
        Lambda, B = self.state_parameters(width, Lambda=Lambda, B=B)
        Delta = jnp.broadcast_to(self.steps(width)[:, None], Lambda.shape)
        discretise = lookup(DISCRETISATIONS, self.discretisation, "model.mixer.discretisation")
        log_A, gain = discretise(Lambda, self.rate * Delta)
        if self.bandlimit:
            cycles = Delta * jnp.abs(Lambda.imag) / (2 * jnp.pi)
            B = jnp.where(cycles < self.bandlimit / 2, B, 0)
        return tuple(Diagonal(log_A, gain * B, 2 * C) for C in self.readouts(width))
