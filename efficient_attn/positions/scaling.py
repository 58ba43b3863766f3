"""RoPE for sequences longer than those trained on: other frequencies, and sometimes another magnitude.

Each class is `Rotary` with its frequencies theta_i = base^(-2i/D) changed by `factor` = s, the length aimed at over the one
trained on. Where a rule goes by the length N of the sequence, N is that of each token's own document, and when decoding the
length so far: keys are cached unrotated, so a longer N turns all of them anew.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from efficient_attn.positions.rotary import Rotary, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Rotary):
    """Base of those that scale by a factor."""

    factor: float

    def __post_init__(self):
        super().__post_init__()
        require(self, "factor", self.factor >= 1, "a factor of at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Scaled):
    """Position interpolation: theta_i / s (PI; Chen et al. 2023, arXiv 2306.15595, eq. 4)."""

    def frequencies(self, head_dim, length):
        return super().frequencies(head_dim, length) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTK(Scaled):
    """NTK-aware: base s^(D/(D-2)), so that the last pair is interpolated by s and the first not at all (bloc97 2023).

    Read as digits of the position in base b = base^(2/D), all digits stretch a little and the last one by exactly s.
    """

    def frequencies(self, head_dim, length):
        return _ntk(self.base, self.factor, head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK(Scaled):
    """NTK-aware by s' = s N / L - (s - 1) in documents of N > L = `trained_length` tokens; else plain RoPE (emozilla 2023)."""

    trained_length: int

    is_plain = False

    def frequencies(self, head_dim, length):
        ratio = jnp.maximum(length, self.trained_length) / self.trained_length
        return _ntk(self.base, (self.factor * ratio - (self.factor - 1))[..., None], head_dim)


def _ntk(base: float, factor, head_dim: int):
    """(base factor^(D/(D-2)))^(-2i/D), factor a number or [_, n, 1]."""
    pairs = np.arange(0, head_dim, 2) / head_dim
    if np.ndim(factor):
        pairs = jnp.asarray(pairs, factor.dtype)[None, None]
    return base**-pairs * factor ** (-pairs * head_dim / max(head_dim - 2, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKByParts(Scaled):
    """Pairs that turn often within the trained length keep their frequency, those that turn seldom are interpolated.

    With r(i) = L theta_i / 2 pi turns, a ramp from r = beta_slow (interpolated) to r = beta_fast (kept) mixes theta_i / s and
    theta_i (YaRN; Peng et al. 2023, arXiv 2309.00071, section 3.2, there alpha and beta). As in its code the ramp is linear in
    i, not in r as in eq. 18, and with `truncate` its ends are rounded outwards to whole pairs.
    """

    trained_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, head_dim, length):
        require(self, "beta_slow", self.beta_slow <= self.beta_fast, f"at most beta_fast={self.beta_fast}")
        theta = super().frequencies(head_dim, length)
        low, high = self._pair_of(self.beta_fast, head_dim), self._pair_of(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return theta / self.factor * ramp + theta * (1 - ramp)

    def _pair_of(self, turns: float, head_dim: int) -> float:
        """The i at which L theta_i = 2 pi turns."""
        return head_dim * math.log(self.trained_length / (2 * math.pi * turns)) / (2 * math.log(self.base))


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN(NTKByParts):
    """NTK-by-parts, and queries and keys both times m = 0.1 ln s + 1, so that logits grow by m^2 (arXiv 2309.00071, eq. 22)."""

    def magnitude(self, length):
        return 0.1 * math.log(self.factor) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(Scaled):
    """Llama 3.1's: wavelengths above L / low are interpolated, those below L / high kept, a ramp in L / wavelength between."""

    trained_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        require(self, "high_freq_factor", self.high_freq_factor > self.low_freq_factor, "more than low_freq_factor")

    def frequencies(self, head_dim, length):
        theta = super().frequencies(head_dim, length)
        turns = self.trained_length * theta / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return kept * theta + (1 - kept) * theta / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRoPE(Scaled):
    """theta_i over a factor of its own, found by search (Ding et al. 2024, arXiv 2402.13753, section 3), as Phi-3 uses it.

    short_factor, long_factor: D/2 numbers each, for documents of up to L = `trained_length` tokens and for longer ones.
    Queries and keys are both multiplied by sqrt(1 + ln s / ln L), whatever the length.
    """

    trained_length: int
    short_factor: Sequence[float]
    long_factor: Sequence[float]

    is_plain = False

    def frequencies(self, head_dim, length):
        for name in ("short_factor", "long_factor"):
            require(self, name, len(getattr(self, name)) == head_dim // 2, f"head size / 2 = {head_dim // 2} numbers")
        theta = super().frequencies(head_dim, length)
        short, long = (jnp.asarray(theta / np.asarray(factors)) for factors in (self.short_factor, self.long_factor))
        return jnp.where((length > self.trained_length)[..., None], long[None, None], short[None, None])

    def magnitude(self, length):
        require(self, "trained_length", self.trained_length > 1, "more than 1")
        return math.sqrt(1 + math.log(self.factor) / math.log(self.trained_length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiraffePower(Rotary):
    """theta_i (1 - 2i/D)^exponent: slow pairs are slowed further (Giraffe; Pal et al. 2023, arXiv 2308.10882, section 3.2)."""

    exponent: float

    def frequencies(self, head_dim, length):
        return super().frequencies(head_dim, length) * (1 - np.arange(0, head_dim, 2) / head_dim) ** self.exponent


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiraffeTruncated(Rotary):
    """theta_i kept from `high` up, `middle` between `low` and `high`, 0 up to `low` (Pal et al. 2023, section 3.3)."""

    low: float
    high: float
    middle: float

    def frequencies(self, head_dim, length) -> Float[np.ndarray, "half"]:
        theta = super().frequencies(head_dim, length)
        return np.where(theta >= self.high, theta, np.where(theta > self.low, self.middle, 0.0))
