"""The infinity-former (Martins et al. 2022, arXiv 2109.00301): long-term memory as a continuous signal of constant size."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.mixers.context import MEMORY, Context
from efficient_attn.mixers.transformer_xl import Ids, TransformerXL


def normal_pdf(x: Float[Array, "*#n"], mean: Float[Array, "*#n"], variance: Float[Array, "*#n"]) -> Float[Array, "*n"]:
    return jnp.exp(-0.5 * jnp.square(x - mean) / variance) / jnp.sqrt(2 * math.pi * variance)


def ridge(
    psi: Float[Array, "B n N"], states: Float[Array, "B n E"], weights: Float[Array, "B n"], penalty: float
) -> Float[Array, "B N E"]:
    """Coefficients of basis functions that fit the states: argmin_C sum_i w_i |psi(t_i) C - x_i|^2 + penalty |C|^2."""
    weighted = psi * weights[..., None]
    gram = jnp.einsum("bin,bim->bnm", weighted, psi) + penalty * jnp.eye(psi.shape[-1], dtype=psi.dtype)[None]
    return jnp.linalg.solve(gram, jnp.einsum("bin,bie->bne", weighted, states))


class InfiniteFormer(TransformerXL):
    """Transformer-XL, and what it forgets kept as N coefficients of Gaussian basis functions on [0, 1] (section 3).

    Each query reads the signal through a Gaussian of its own place and width. States that drop out of the memory contract the old
    signal to [0, tau], where it is sampled and fitted anew together with them. Sampling is even, or, `sticky`, denser where the
    last segment has looked, by quantiles of its mean density (the paper draws from its histogram). The fit is in float32. A
    document starts with an empty signal.

    num_basis: N; 150 in the paper's language models.
    basis_widths: standard deviations, each of an equal part of the functions, whose centres are evenly spread.
    ridge_penalty: lambda of the fit. contraction: tau. num_samples: places at which the old signal is sampled.
    kl_weight, prior_width: weight of the divergence of a query's width from the prior's (section 3.2), sown into `losses`.
    """

    num_basis: int = 128
    basis_widths: Sequence[float] = (0.01, 0.05)
    ridge_penalty: float = 0.5
    contraction: float = 0.5
    num_samples: int = 128
    sticky: bool = False
    kl_weight: float = 1e-6
    prior_width: float = 0.05

    def basis(self) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        """Centres and variances."""
        each, rest = divmod(self.num_basis, len(self.basis_widths) or self.num_basis + 1)
        if rest or not each:
            raise ValueError(
                f"model.mixer.num_basis={self.num_basis} must be a multiple of {len(self.basis_widths)} basis_widths"
            )
        variances = jnp.square(jnp.array(self.basis_widths, jnp.float32))
        return jnp.tile(jnp.linspace(0, 1, each), len(self.basis_widths)), jnp.repeat(variances, each)

    def psi(self, t: Float[Array, "B n"]) -> Float[Array, "B n N"]:
        centres, variances = self.basis()
        return normal_pdf(t[..., None], centres[None, None], variances[None, None])

    def long_term(self, x: Float[Array, "B L E"], ids: Int[Array, "B L"], ctx: Context) -> Float[Array, "B L E"]:
        B, _, E = x.shape
        carried = self.has_variable(MEMORY, "states")
        coefficients, document = jnp.zeros((B, self.num_basis, E)), jnp.zeros((B,), jnp.int32)
        if carried:
            coefficients = self.variable(MEMORY, "coefficients", lambda: coefficients).value
            document = self.variable(MEMORY, "document", lambda: document).value
        signal = jax.lax.stop_gradient(coefficients).astype(x.dtype)
        heads, _, head_dim = self._sizes(E)
        q, k, v = (
            self._dense((heads, head_dim), f"signal_{name}")(y) for name, y in (("query", x), ("key", signal), ("value", signal))
        )
        scores = (jnp.einsum("blhd,bnhd->blhn", q, k) * head_dim**-0.5).astype(jnp.float32)
        mean = nn.sigmoid(nn.Dense(1, name="mean")(scores))
        variance = nn.softplus(nn.Dense(1, name="variance")(scores)) + 1e-6
        centres, variances = self.basis()
        weights = normal_pdf(centres[None, None, None], mean, variance + variances[None, None, None])
        reads = (ids == document[:, None]) & (ids > 0)
        read = jnp.einsum("blhn,bnhd->blhd", weights.astype(x.dtype), v) * reads[..., None, None]
        if carried:
            self._sow_divergence(variance, reads)
            if self.is_mutable_collection(MEMORY):
                self._contract(x, ids, document, mean, variance, reads)
        return self._dense(E, "signal_out", axis=(-2, -1))(read) * reads[..., None]

    def _sow_divergence(self, variance: Float[Array, "B L H 1"], reads) -> None:
        """KL(N(mu, sigma^2) || N(mu, prior^2)) averaged over the queries that read."""
        ratio = variance / self.prior_width**2
        divergence = 0.5 * (ratio - jnp.log(ratio) - 1).mean(axis=(2, 3))
        self.sow("losses", "divergence", self.kl_weight * jnp.sum(divergence * reads) / jnp.maximum(jnp.sum(reads), 1))

    def _contract(self, x, ids: Ids, document: Int[Array, "B"], mean, variance, reads) -> None:
        """Fit the signal to itself, contracted, and to the states that are about to drop out of the memory."""
        L = x.shape[1]
        states = jnp.concatenate([self.get_variable(MEMORY, "states"), jax.lax.stop_gradient(x)], axis=1)[:, :L]
        state_ids = jnp.concatenate([self.get_variable(MEMORY, "states_ids"), ids], axis=1)[:, :L]
        new_document = state_ids[:, -1]
        continues = (new_document == document) & (document > 0)
        old_t = jax.lax.stop_gradient(self._sample_places(mean, variance, reads))
        old = jnp.einsum("bmn,bne->bme", self.psi(old_t), self.get_variable(MEMORY, "coefficients"))
        tau = jnp.where(continues, self.contraction, 0.0)[:, None]
        even = (jnp.arange(self.num_samples) + 0.5) / self.num_samples
        t = jnp.concatenate([tau * even[None], tau + (1 - tau) * ((jnp.arange(L) + 0.5) / L)[None]], axis=1)
        belongs = (state_ids == new_document[:, None]) & (state_ids > 0)
        kept = jnp.broadcast_to(continues[:, None], old.shape[:2])
        weights = jnp.concatenate([kept, belongs], axis=1).astype(jnp.float32)
        fitted = ridge(self.psi(t), jnp.concatenate([old, states.astype(jnp.float32)], axis=1), weights, self.ridge_penalty)
        self.put_variable(MEMORY, "coefficients", fitted)
        self.put_variable(MEMORY, "document", new_document)

    def _sample_places(self, mean, variance, reads) -> Float[Array, "B M"]:
        """Where the old signal is sampled: evenly, or at quantiles of where the segment's queries looked."""
        even = (jnp.arange(self.num_samples) + 0.5) / self.num_samples
        B = mean.shape[0]
        if not self.sticky:
            return jnp.broadcast_to(even[None], (B, self.num_samples))
        density = normal_pdf(even[None, None, None], mean, variance).mean(axis=2) * reads[..., None]
        mass = density.sum(axis=1) + jnp.where(reads.any(axis=1), 0.0, 1.0)[:, None]
        edges = jnp.arange(self.num_samples + 1) / self.num_samples
        cumulative = jnp.pad(jnp.cumsum(mass, axis=1), ((0, 0), (1, 0)))
        return jax.vmap(lambda cdf: jnp.interp(even * cdf[-1], cdf, edges))(cumulative)
