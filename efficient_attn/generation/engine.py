"""Many requests through one batch of rows: which run, when they start, and what makes way when blocks run out.

Iteration-level scheduling (Orca, Yu et al. 2022, section 3.2): after every few steps rows whose sequence has ended go to the next
requests, first come, first served. Where a paged cache runs out of blocks the sequence that came last gives its own back and is
computed again later, from its prompt and what it had generated (vLLM, Kwon et al. 2023, section 4.5).
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from efficient_attn.arguments import ConfigError
from efficient_attn.generation import caches
from efficient_attn.generation.blocks import OutOfBlocks
from efficient_attn.generation.decoding import MAX_STEPS, NO_TOKEN, Decoder, Rows, left_to_steps
from efficient_attn.generation.sampling import GREEDY, Sampling

LEAST_STEPS = 4
"""Steps between two looks of the host where some row ends sooner: a few idle steps of it cost less than the look."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Continue `prompt` by up to `max_tokens` tokens; equal seeds draw equal tokens, whatever else runs."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int = 0

    def __post_init__(self):
        if not self.prompt:
            raise ConfigError("a prompt must have at least one token")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")


@dataclasses.dataclass
class Generation:
    """A request under way: its number, in order of arrival, the tokens generated so far, and how many are in the cache."""

    number: int
    request: Request
    generated: list[int] = dataclasses.field(default_factory=list)
    stored: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.generated)

    @property
    def left(self) -> int:
        """Steps to its end, if no stop token comes."""
        return len(self.request.prompt) + self.request.max_tokens - 1 - self.stored


@dataclasses.dataclass
class Counts:
    """What was done: steps of the whole batch, tokens put out, sequences that made way, rows whose prompt was another's too."""

    steps: int = 0
    tokens: int = 0
    preempted: int = 0
    forked: int = 0


class Engine:
    """Runs requests on `rows` rows of at most `length` tokens.

    continuous: rows go to waiting requests as they become free; otherwise only when all are free (static batching).
    stop: the token that ends a sequence, which is part of it; `NO_TOKEN` for none.
    steps: tokens of a sequence between two looks of the host, at most; smaller ones stream more smoothly.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        length: int,
        *,
        sampling: Sampling = GREEDY,
        stop: int = NO_TOKEN,
        continuous: bool = True,
        steps: int = MAX_STEPS,
    ):
        self.decoder, self.sampling, self.stop, self.continuous, self.steps = decoder, sampling, stop, continuous, steps
        self.cache = caches.new(decoder, rows, length)
        self.counts = Counts()
        self._waiting: collections.deque[Generation] = collections.deque()
        self._running: dict[int, Generation] = {}
        self._arrived = 0

    def submit(self, request: Request) -> int:
        """Queue a request and return its number. Raises `ConfigError` where it can never fit."""
        if len(request.prompt) + request.max_tokens > self.cache.capacity:
            raise ConfigError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} more do not fit in a cache of "
                f"{self.cache.capacity} tokens"
            )
        self._waiting.append(Generation(self._arrived, request))
        self._arrived += 1
        return self._arrived - 1

    def run(self) -> Iterator[tuple[int, list[int]]]:
        """Generate until nothing is left: (number, new tokens) as they come."""
        while self._waiting or self._running:
            self._admit()
            yield from self._step()

    def _admit(self) -> None:
        """Start waiting sequences in free rows, as far as there are rows and blocks."""
        free = [row for row in range(self.cache.rows) if row not in self._running]
        if not self.continuous and len(free) < self.cache.rows:
            return
        leaders: dict[tuple[int, ...], int] = {}
        forks: list[tuple[int, int]] = []
        while self._waiting and free:
            tokens = self._waiting[0].tokens[:-1]
            if tokens in leaders:
                forks.append((free[0], leaders[tokens]))
            elif self.cache.has_room([len(t) + 1 for t in (*leaders, tokens)]):
                leaders[tokens] = free[0]
            else:
                break
            self._running[free.pop(0)] = self._waiting.popleft()
        if leaders:
            left = left_to_steps([len(tokens) for tokens in leaders], len(self._running))
            self._start(list(leaders.values()), [tokens[: len(tokens) - n] for tokens, n in zip(leaders, left)])
        if forks:
            self.cache.fork(*zip(*forks))
            for row, leader in forks:
                self._running[row].stored = self._running[leader].stored
            self.counts.forked += len(forks)

    def _start(self, rows: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> None:
        self.cache.admit(rows, prompts)
        for row, prompt in zip(rows, prompts):
            self._running[row].stored = len(prompt)

    def _step(self) -> Iterator[tuple[int, list[int]]]:
        """Decode a few tokens of every running sequence, and end those that are done."""
        steps = self._reserve()
        rows = self._rows()
        state, after, out = self.decoder.decode(
            self.cache.state, rows, self.cache.tables(), steps, sampling=self.sampling, stop=self.stop
        )
        self.cache.state = state
        count, pending, active, out = jax.device_get((after.count, after.pending, after.active, out))
        fed = rows.pending - pending
        self.counts.steps += int((fed + count - rows.count).max())
        for row, sequence in list(self._running.items()):
            new = out[row, fed[row] :][: count[row] - rows.count[row]].tolist()
            sequence.generated += new
            sequence.stored += int(fed[row]) + len(new)
            self.counts.tokens += len(new)
            self.cache.publish(row, sequence.tokens[: sequence.stored])
            if not active[row]:
                self.cache.free(row)
                del self._running[row]
            yield sequence.number, new

    def _reserve(self) -> int:
        """How many tokens to decode next, with room for them; the oldest sequences first, the newest make way."""
        left = [sequence.left for sequence in self._running.values()]
        steps = min(self.steps, max(LEAST_STEPS, min(left)) if self._waiting and self.continuous else max(left))
        for row, sequence in sorted(self._running.items(), key=lambda item: item[1].number):
            while row in self._running:
                try:
                    self.cache.reserve(row, sequence.stored + min(steps, sequence.left))
                    break
                except OutOfBlocks:
                    self._preempt()
        return steps

    def _preempt(self) -> None:
        """Take the sequence that came last out of its row; it is the next to start again."""
        row, sequence = max(self._running.items(), key=lambda item: item[1].number)
        self.cache.free(row)
        del self._running[row]
        self._waiting.appendleft(sequence)
        self.counts.preempted += 1

    def _rows(self) -> Rows:
        rows = Rows.idle(self.cache.rows)
        for row, sequence in self._running.items():
            token, *pending = sequence.tokens[sequence.stored :]
            rows.token[row], rows.count[row], rows.active[row] = token, len(sequence.generated), True
            rows.limit[row], rows.seed[row] = sequence.request.max_tokens, sequence.request.seed
            rows.pending[row], rows.prompt[row, : len(pending)] = len(pending), pending
        return rows


def generate(
    decoder: Decoder, requests: Iterable[Request], *, rows: int | None = None, length: int | None = None, **options
) -> list[list[int]]:
    """The continuation of each request. By default there is a row for each, as long as the longest needs."""
    requests = list(requests)
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    engine = Engine(decoder, rows or len(requests), length or longest, **options)
    for request in requests:
        engine.submit(request)
    results: list[list[int]] = [[] for _ in requests]
    for number, new in engine.run():
        results[number] += new
    return results


def seeds(seed: int, count: int) -> Sequence[int]:
    """Seeds of several requests from one."""
    return [int(x) for x in np.random.SeedSequence(seed).generate_state(count, np.uint32) >> 1]
