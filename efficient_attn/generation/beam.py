"""Beam search: the continuations of highest probability that a beam of a given width finds."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.generation import caches
from efficient_attn.generation.decoding import NO_TOKEN, Decoder


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """Generated tokens, the stop token included, and their log-probability in all."""

    tokens: tuple[int, ...]
    log_probability: float

    def score(self, length_penalty: float) -> float:
        return self.log_probability / len(self.tokens) ** length_penalty


def beam_search(
    decoder: Decoder,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_tokens: int,
    stop: int = NO_TOKEN,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    """Up to `num_beams` hypotheses, best first by log-probability / tokens^length_penalty (as the transformers package scores).

    A hypothesis ends at `stop` or at `max_tokens`. The search ends when no beam can still become one of the best by ending now.
    A paged cache shares blocks between beams until they write.
    """
    if num_beams < 1 or max_tokens < 1 or not prompt:
        raise ConfigError(f"num_beams={num_beams} and max_tokens={max_tokens} must be at least 1, and the prompt not empty")
    longest = len(prompt) + max_tokens
    cache = caches.new(decoder, num_beams, longest)
    if not cache.has_room([longest] * num_beams):
        raise ConfigError(f"{num_beams} beams of {longest} tokens may not fit in the cache's blocks; give it more")
    cache.admit([0], [prompt[:-1]])
    cache.fork(range(1, num_beams), [0] * (num_beams - 1))
    ended: list[Hypothesis] = []
    beams = [Hypothesis((), 0.0)]
    last = [prompt[-1]] * num_beams
    for step in range(max_tokens):
        for row in range(num_beams):
            cache.reserve(row, len(prompt) + step)
        cache.state, logits = decoder.scores(cache.state, jnp.array(last, jnp.int32), cache.tables())
        totals = np.full(num_beams, -np.inf, np.float32)
        totals[: len(beams)] = [beam.log_probability for beam in beams]
        best, index = (np.asarray(x) for x in _best(logits, totals, 2 * num_beams))
        parents, new = np.divmod(index, logits.shape[1])
        grown = [
            (int(parent), Hypothesis((*beams[parent].tokens, int(token)), float(total)))
            for parent, token, total in zip(parents, new, best)
            if np.isfinite(total)
        ]
        ended += [beam for _, beam in grown if beam.tokens[-1] == stop or step + 1 == max_tokens]
        ended = sorted(ended, key=lambda beam: -beam.score(length_penalty))[:num_beams]
        alive = [(parent, beam) for parent, beam in grown if beam.tokens[-1] != stop][:num_beams]
        beams = [beam for _, beam in alive]
        is_settled = len(ended) == num_beams and beams and beams[0].score(length_penalty) <= ended[-1].score(length_penalty)
        if not beams or is_settled or step + 1 == max_tokens:
            return ended
        spare = num_beams - len(alive)  # rows without a beam copy the first and count for nothing
        cache.reorder([parent for parent, _ in alive] + [alive[0][0]] * spare)
        last = [beam.tokens[-1] for beam in beams] + [beams[0].tokens[-1]] * spare
    return ended


@jax.jit(static_argnames="count")
def _best(logits: Float[Array, "K V"], totals: Float[Array, "K"], count: int):
    """The `count` highest sums of a beam's log-probability and a token's, and their places in [K V]."""
    sums = (totals[:, None] + jax.nn.log_softmax(logits, axis=-1)).reshape(-1)
    return jax.lax.top_k(sums, min(count, sums.shape[0]))
