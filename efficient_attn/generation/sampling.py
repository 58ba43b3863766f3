"""From scores of the next token to a token: greedy, or drawn after temperature, top-k and top-p. Pure functions of arrays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from efficient_attn.arguments import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: scores are divided by it before anything else; 0 takes the best token (greedy).
    top_k: draw from the k best tokens only (Fan et al. 2018); 0 from all.
    top_p: draw from the fewest tokens that have this much probability (nucleus sampling, Holtzman et al. 2020); 1 from all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "a number of at least 0; 0 is greedy"),
            "top_k": (self.top_k >= 0, "at least 0; 0 keeps all tokens"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1; 1 keeps all tokens"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} must be {expected}")


GREEDY = Sampling(temperature=0.0)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Scores of all but the k best tokens become -inf; ties with the k-th stay."""
    if not 0 < k < logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Scores outside the smallest set of best tokens with probability p or more become -inf; ties with its last stay."""
    if p >= 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    is_kept = jnp.pad(mass < p, ((0, 0), (1, 0)), constant_values=True)[:, :-1]  # while those before it have less than p
    least = jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], counts: Int[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:  # fmt: skip
    """The next token of each row. `counts` numbers the draws of a row: with its key they decide the draw, whatever else runs."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    drawn = jax.vmap(lambda key, count: jax.random.gumbel(jax.random.fold_in(key, count), logits.shape[1:]))(keys, counts)
    return jnp.argmax(logits + drawn, axis=-1).astype(jnp.int32)
