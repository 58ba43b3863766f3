"""Reformer: attention to tokens of the same locality-sensitive hash (Kitaev et al. 2020, arXiv 2001.04451)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.content import ContentAttention, groups_or_zero
from efficient_attn.mixers.context import Context
from efficient_attn.mixers.lsh import angular_hash, draw_rotations, lsh_attention


class Reformer(ContentAttention):
    """Shared queries and keys, hashed, sorted by hash, and attended in chunks (section 2); time O(L rounds chunk_size).

    chunk_size: m, tokens of a chunk, 64 to 128 in the paper.
    look_back, look_ahead: chunks that are seen before (1) and after (0) the own one, in sorted order.
    rounds: n_rounds, hashes whose attention is merged; 4 to 8 in the paper, best with the most.
    num_buckets: an even number, or several whose product is meant (`lsh.angular_hash`). None is the paper's m = 2 L / n, rounded
        down to a power of two, in two factors where there are more than 128.
    across_buckets: tokens of a chunk see each other whatever their buckets, as in transformers' code. The paper's do not.
    correct_duplicates: a pair that several rounds let see each other counts once (appendix A). Not in released code.
    seed: of the rotations outside training. Layers draw the same ones unless given different seeds, by a tuple of mixer dicts.
    resample: draw new rotations at every step of training, from the `dropout` stream.

    The causal form never reads a later token, but later tokens take places in chunks that are sorted with it, so what it can see
    of the earlier ones depends on them; therefore it does not decode. Documents are sorted one after the other, and a chunk may
    begin in one and end in the next: each is as if alone but for where chunks begin.
    """

    chunk_size: int = 64
    look_back: int = 1
    look_ahead: int = 0
    rounds: int = 4
    num_buckets: int | Sequence[int] | None = None
    across_buckets: bool = False
    correct_duplicates: bool = True
    seed: int = 0
    resample: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"], ctx: Context) -> Float[Array, "B L E"]:
        self.check(ctx, chunk_size=self.chunk_size, rounds=self.rounds)
        qk, v = self.project(x, "query_key"), self.project(x, "value")
        buckets = self._buckets(x.shape[1])
        is_drawn = ctx.train and self.resample
        key = self.make_rng("dropout") if is_drawn else jax.random.key(self.seed)
        rotations = draw_rotations(key, *qk.shape[2:], self.rounds, buckets)
        out = lsh_attention(
            qk,
            v,
            angular_hash(jax.lax.stop_gradient(qk), rotations, buckets),
            chunk_size=min(self.chunk_size, x.shape[1]),
            look_back=self.look_back,
            look_ahead=self.look_ahead,
            causal=self.causal,
            groups=groups_or_zero(ctx, *x.shape[:2]),
            across_buckets=self.across_buckets,
            correct_duplicates=self.correct_duplicates,
            dropout=self.weights_dropout(ctx),
            implementation=self.implementation,
        )
        return self.output(out, x.shape[-1])

    def _buckets(self, length: int) -> tuple[int, ...]:
        if self.num_buckets is None:
            bits = max(1, (2 * length // self.chunk_size).bit_length() - 1)
            return (2**bits,) if bits <= 7 else (2 ** (bits // 2), 2 ** (bits - bits // 2))
        buckets = (self.num_buckets,) if isinstance(self.num_buckets, int) else tuple(self.num_buckets)
        if not buckets or any(n < 2 or n % 2 for n in buckets):
            raise ConfigError(f"reformer: num_buckets={self.num_buckets!r}; give an even number, or several to be multiplied")
        return buckets
