"""The parameters that S4 and S4D share: real systems by one of each conjugate pair of their eigenvalues."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from efficient_attn.arguments import lookup
from efficient_attn.mixers.ssm.features import FeatureStateSpace, as_complex, complex_normal, log_uniform


def _softplus_inverse(y):
    return y + jnp.log(-jnp.expm1(-y))


STEP_TRANSFORMS: Mapping[str, tuple[Callable, Callable]] = {
    "exp": (jnp.exp, jnp.log),
    "softplus": (jax.nn.softplus, _softplus_inverse),
}
"""Delta as a function of the trained parameter `step`, and the inverse."""


class PairedStateSpace(FeatureStateSpace):
    """Trained Lambda with Re Lambda = -exp(Lambda_log_neg_re) < 0, C, Delta and what else a system has.

    state_dim: N, the size of each channel's real-valued state; N/2 complex numbers carry it, one of each conjugate pair.
    copies: how many (Lambda, P, B) are trained, which must divide the channels; channel e uses the (e mod copies)-th. 0: one for
        each channel ("n_ssm" in the released code). C, D and Delta are each channel's own.
    dt_min, dt_max: range of the log-uniform initial step sizes Delta.
    step_transform: one of `STEP_TRANSFORMS`; the released code had "exp" and now has "softplus".
    """

    state_dim: int = 64
    copies: int = 0
    dt_min: float = 0.001
    dt_max: float = 0.1
    step_transform: str = "exp"

    def initial(self, table: Mapping[str, Callable], name: str) -> tuple[np.ndarray, ...]:
        """The entry `name` of `table` for this state size."""
        if self.state_dim % 2:
            raise ValueError(f"state_dim={self.state_dim} must be even: eigenvalues come in conjugate pairs")
        return lookup(table, name, "model.mixer.A_init")(self.state_dim)

    def state_parameters(self, width: int, *, Lambda: np.ndarray, **others: np.ndarray) -> list[Complex[Array, "E n"]]:
        """Lambda and each of `others` [n] as trained complex numbers [E, n], started from these values."""
        copies = self.copies or width
        if copies < 0 or width % copies:
            raise ValueError(f"copies={self.copies} must divide the {width} channels")
        decay = np.log(np.maximum(-Lambda.real, 1e-4))  # some HiPPO matrices have real part 0
        real = -jnp.exp(self.param("Lambda_log_neg_re", _repeated, decay, copies))
        trained = [lax.complex(real, self.param("Lambda_im", _repeated, Lambda.imag, copies))]
        for name, value in others.items():
            trained.append(as_complex(self.param(name, _repeated, np.stack([value.real, value.imag], axis=-1), copies)))
        return [jnp.tile(z, (width // copies, 1)) for z in trained]

    def steps(self, width: int) -> Float[Array, "E"]:
        """Delta."""
        transform, inverse = lookup(STEP_TRANSFORMS, self.step_transform, "model.mixer.step_transform")

        def initialise(key):
            return inverse(jnp.exp(log_uniform(key, (width,), self.dt_min, self.dt_max)))

        return transform(self.param("step", initialise))

    def readouts(self, width: int) -> list[Complex[Array, "E n"]]:
        """C of each direction."""
        C = as_complex(self.param("C", complex_normal, (self.directions, width, self.state_dim // 2)))
        return [C[i] for i in range(self.directions)]


def _repeated(key, value: np.ndarray, copies: int) -> Float[Array, "..."]:
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (copies, *value.shape))
