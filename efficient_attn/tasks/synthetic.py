"""Synthetic recall tasks, drawn as they are read: multi-query associative recall, induction heads, selective copying.

Nothing is stored. Example i of a split is a pure function of (the task's fields, split, i), and so are all batches of them.
Splits draw from separate streams of the same distribution; nothing else keeps a test example from being a training example,
so `cost()` says how likely that is: never, in effect, at the published sizes (below 1e-20), but often where vocabulary and
length are tiny.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from efficient_attn.tasks.base import SPLITS, Example, Head, Source, Split, Task, TaskError

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, a bijection of 64-bit words in which every input bit affects every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """Random numbers for n examples at once. Row r depends on (key, indices[r]) and on the sequence of calls, nothing else.

    Row r is the stream of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014) that starts at
    mix(key + indices[r] gamma). As in any counter-based generator no state precedes a number, so that a random access costs
    nothing and a batch is a few array operations; and the numbers do not change with the version of NumPy.
    """

    def __init__(self, key: int, indices: np.ndarray):
        self._start = _mix(np.uint64(key) + np.asarray(indices).astype(np.uint64) * GAMMA)[:, None]
        self._used = 0

    def uniform(self, count: int) -> np.ndarray:
        """Float64 [n, count], uniform on the multiples of 2^-53 in [0, 1)."""
        steps = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64)
        self._used += count
        return (_mix(self._start + steps * GAMMA) >> np.uint64(11)) * 2.0**-53

    def integers(self, bound: int, count: int) -> np.ndarray:
        """Int32 [n, count], uniform in 0..bound-1."""
        return (self.uniform(count) * bound).astype(np.int32)

    def distinct(self, bound: int, count: int) -> np.ndarray:
        """Int32 [n, count]: uniform ordered samples without replacement from 0..bound-1.

        Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", 1987) draws a uniform subset in `count` steps whatever
        the bound; a shuffle then makes its order uniform.
        """
        uniform = self.uniform(count)
        chosen = np.empty(uniform.shape, np.int32)
        for d in range(count):
            last = bound - count + d
            draw = (uniform[:, d] * (last + 1)).astype(np.int32)
            taken = np.any(chosen[:, :d] == draw[:, None], axis=1)
            chosen[:, d] = np.where(taken, last, draw)
        return np.take_along_axis(chosen, np.argsort(self.uniform(count), axis=1), axis=1)

    def weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """Int64 [n, count]: items drawn one after another without replacement, each with probability ~ its weight.

        The order of Exp(1) / weight has this distribution (Efraimidis and Spirakis, 2006).
        """
        arrivals = -np.log1p(-self.uniform(len(weights))) / weights
        return np.argsort(arrivals, axis=1)[:, :count]


class _DrawnSource:
    """One split of a `SyntheticTask`; `batch` draws many examples at once."""

    def __init__(self, task: "SyntheticTask", split: Split):
        self._task, self._size = task, task.sizes[split]
        self._key = int(np.random.SeedSequence([task.seed, SPLITS.index(split)]).generate_state(1, np.uint64)[0])

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Example:
        """The examples at `indices` [n], stacked: every array has a leading axis n."""
        if np.min(indices) < 0 or np.max(indices) >= self._size:
            raise IndexError(f"example indices must be in [0, {self._size}); got {np.min(indices)}..{np.max(indices)}")
        inputs, targets, scored = self._task.draw(Draws(self._key, indices))
        return {
            "inputs": inputs,
            "targets": targets,
            "weights": scored.astype(np.float32),
        }


@dataclasses.dataclass(frozen=True)
class SyntheticTask(Task):
    """Base of the tasks below: head "lm", predictions scored at a few positions only, every position a real token.

    Fields:
        length: L, the number of positions.
        vocab_size: V, special tokens included.
        num_examples: of train. A run longer than one epoch sees them again, in another order.
        num_eval: of valid, and of test.
        seed: of the data (the run's own seed orders them).
    """

    head: ClassVar[Head] = "lm"
    padded: ClassVar[bool] = False
    slug: ClassVar[str]

    length: int = 64
    vocab_size: int = 16
    num_examples: int = 100_000
    num_eval: int = 3_000
    seed: int = 0

    def __post_init__(self):
        if min(self.num_examples, self.num_eval) < 1 or self.seed < 0:
            raise TaskError(f"{self.slug}: num_examples and num_eval must be positive and seed not negative; got {self}.")
        self.check()

    @abc.abstractmethod
    def check(self) -> None:
        """Raises `TaskError` if the fields contradict each other."""

    @abc.abstractmethod
    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """n examples: inputs [n, L] int32, targets [n, L] int32, scored [n, L] bool (where a prediction counts)."""

    @property
    @abc.abstractmethod
    def log2_space(self) -> float:
        """Base-2 logarithm of the number of different examples, (about) equally likely."""

    @property
    def name(self) -> str:
        return "-".join([self.slug, *(f"{key}{value}" for key, value in dataclasses.asdict(self).items())])

    @property
    def num_outputs(self) -> int:
        return self.vocab_size

    @property
    def sizes(self) -> Mapping[Split, int]:
        return {"train": self.num_examples, "valid": self.num_eval, "test": self.num_eval}

    def cost(self) -> str:
        seen = -math.expm1(-(2.0 ** (math.log2(self.num_examples) - self.log2_space)))
        return f"no files: examples are drawn as they are read; about {seen:.1g} of the test examples also occur in train"

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def source(self, split: Split) -> Source:
        return _DrawnSource(self, split)


@dataclasses.dataclass(frozen=True)
class MultiQueryRecall(SyntheticTask):
    """Multi-query associative recall, MQAR (Arora, Eyuboglu et al., "Zoology", 2023, Figure 2 and Appendix; their generator).

        inputs    k1 v1 k2 v2 .  .  .  k2 .  .  .  k1 .  .          D = 2 pairs, `.` = filler
        targets                        v2          v1               scored here only

    D distinct keys from 1..V/2-1 and D distinct values from V/2..V-1, independent in each example, fill the first 2D
    positions. The remaining (L - 2D) / 2 even positions are slots; each key is asked again in one of them, drawn without
    replacement in the order of the keys with p(j) ~ j^(power - 1), j = 1, 2, ... (near slots likelier; power = 1 is uniform).
    The target of a queried key is its value, at the same position. Filler is token 0, or with `random_non_queries` uniform in
    0..V-1. Defaults are the easiest setting of Figure 2: (L, D) = (64, 4), then (128, 8), (256, 16), (512, 64); trained with
    100k examples, tested on 3k. There the test set also selects; here valid is drawn apart, as large as test.
    """

    slug: ClassVar[str] = "multi_query_recall"

    vocab_size: int = 8192
    num_pairs: int = 4
    power: float = 0.01
    random_non_queries: bool = False

    def check(self) -> None:
        if self.length % 2 or self.num_pairs < 1 or not 4 * self.num_pairs <= self.length < self.vocab_size:
            raise TaskError(
                f"multi_query_recall: length must be even and 4 num_pairs <= length < vocab_size; got length={self.length}, "
                f"num_pairs={self.num_pairs}, vocab_size={self.vocab_size}."
            )

    @property
    def num_slots(self) -> int:
        return (self.length - 2 * self.num_pairs) // 2

    @property
    def log2_space(self) -> float:
        keys, values = self.vocab_size // 2 - 1, self.vocab_size - self.vocab_size // 2
        return sum(math.log2(math.perm(n, self.num_pairs)) for n in (keys, values, self.num_slots))

    @property
    def floors(self) -> Mapping[str, float]:
        """A guess among all values; a guess among the values of the example."""
        return {
            "any value": 1 / (self.vocab_size - self.vocab_size // 2),
            "any value of the example": 1 / self.num_pairs,
        }

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        half, pairs = self.vocab_size // 2, 2 * self.num_pairs
        keys = 1 + draws.distinct(half - 1, self.num_pairs)
        values = half + draws.distinct(self.vocab_size - half, self.num_pairs)
        odds = np.arange(1, self.num_slots + 1) ** (self.power - 1)
        queries = pairs + 2 * draws.weighted(odds, self.num_pairs)

        inputs = np.zeros((len(keys), self.length), np.int32)
        inputs[:, 0:pairs:2], inputs[:, 1:pairs:2] = keys, values
        np.put_along_axis(inputs, queries, keys, axis=1)
        targets = np.zeros_like(inputs)
        np.put_along_axis(targets, queries, values, axis=1)
        if self.random_non_queries:
            inputs = np.where(inputs == 0, draws.integers(self.vocab_size, self.length), inputs)
        return inputs, targets, targets > 0


@dataclasses.dataclass(frozen=True)
class InductionHeads(SyntheticTask):
    """Induction heads: which token followed the trigger the first time? (Mamba: Gu and Dao, 2023, section 4.1.2, Table 11.)

        inputs    a  c  T  b  a  a  c  b  T         T = trigger
        targets                           b         scored here only

    L - 1 uniform regular tokens and the trigger at the end; the trigger is also planted at a uniform position among the first
    L - 3, so that a regular token follows it (the generator of H3 and Hyena, HazyResearch/safari, with one trigger and
    `induction_len` 1). Tokens 0..V-2 are regular, V-1 is the trigger.

    Mamba's own generator is unpublished. Its setting is L = 256, V = 16, fresh examples at every step, batch 8, "epochs" of
    8192 steps, up to 25 for attention with absolute positions and for Mamba: the default `num_examples`, so that a run of
    this length sees none twice. Its validation sets are of unstated size (the figures are multiples of 1/256). Two
    differences from safari: there V counts one more token that never occurs (our vocab_size = its vocab_size - 1), and
    training there also scores the other, unpredictable positions.
    """

    slug: ClassVar[str] = "induction_heads"

    length: int = 256
    num_examples: int = 25 * 8192 * 8
    num_eval: int = 1024

    def check(self) -> None:
        if self.length < 4 or self.vocab_size < 3:
            raise TaskError(
                f"induction_heads: length must be at least 4 and vocab_size at least 3 (two regular tokens and the trigger); "
                f"got length={self.length}, vocab_size={self.vocab_size}."
            )

    @property
    def log2_space(self) -> float:
        return (self.length - 2) * math.log2(self.vocab_size - 1) + math.log2(self.length - 3)

    @property
    def floors(self) -> Mapping[str, float]:
        return {"any regular token": 1 / (self.vocab_size - 1)}

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        trigger = self.vocab_size - 1
        inputs = draws.integers(trigger, self.length)
        planted = draws.integers(self.length - 3, 1)
        np.put_along_axis(inputs, planted, trigger, axis=1)
        inputs[:, -1] = trigger
        targets, scored = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        targets[:, -1:] = np.take_along_axis(inputs, planted + 1, axis=1)
        scored[:, -1] = True
        return inputs, targets, scored


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(SyntheticTask):
    """Selective copying: reproduce, in order, the data tokens scattered among noise (Mamba: Gu and Dao, 2023, Table 1, E.1).

        inputs    .  5  .  .  2  .  7  .  M  M  M         `.` = noise, M = marker: now answer
        targets                           5  2  7         scored here only

    Token 0 is noise, V-1 the marker, 1..V-2 are data. `num_tokens` uniform data tokens lie at distinct uniform positions
    before the markers, as many as the markers. Mamba states L = 4096, V = 16 with the noise token, 16 data tokens, 400k steps
    of batch 64; its generator is unpublished. This is the layout of its predecessor (state-spaces/s4, `copying` with
    `variable`), with two choices where the paper is silent: L counts all positions, markers included (the S4 repository's
    `l_noise` = L - 2 num_tokens), and V counts the marker. The published figure does not say whether a token or a whole
    sequence is counted; here it is a token. Default `num_examples` is that of the 400k steps, so that no example repeats.
    """

    slug: ClassVar[str] = "selective_copying"

    length: int = 4096
    num_examples: int = 400_000 * 64
    num_eval: int = 1024
    num_tokens: int = 16

    def check(self) -> None:
        if self.num_tokens < 1 or self.length < 2 * self.num_tokens or self.vocab_size < 4:
            raise TaskError(
                f"selective_copying: length must be at least 2 num_tokens >= 2 and vocab_size at least 4 (noise, marker, two "
                f"data tokens); got length={self.length}, num_tokens={self.num_tokens}, vocab_size={self.vocab_size}."
            )

    @property
    def log2_space(self) -> float:
        places = math.comb(self.length - self.num_tokens, self.num_tokens)
        return math.log2(places) + self.num_tokens * math.log2(self.vocab_size - 2)

    @property
    def floors(self) -> Mapping[str, float]:
        return {"any data token": 1 / (self.vocab_size - 2)}

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        answers = self.length - self.num_tokens
        data = 1 + draws.integers(self.vocab_size - 2, self.num_tokens)
        places = np.sort(draws.distinct(answers, self.num_tokens), axis=1)
        inputs = np.zeros((len(data), self.length), np.int32)
        np.put_along_axis(inputs, places, data, axis=1)
        inputs[:, answers:] = self.vocab_size - 1
        targets = np.zeros_like(inputs)
        targets[:, answers:] = data
        return inputs, targets, targets > 0
