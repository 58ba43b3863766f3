"""From a `Source` to batches: a shuffled endless stream for training, one padded pass in order for evaluation.

Training batch i is a pure function of (source, seed, i). The stream is the concatenation of epochs, each a fresh uniform
permutation of the whole source, cut into batches without regard to where an epoch ends: nothing is dropped, and a source
smaller than a batch simply appears more than once in it. Resuming is starting at another i, and a process of several
reads its rows of the same global batch; there is no iterator state to save.

Batches are read ahead by grain's threads, one whole batch a read. A source whose examples are cheap to make together may
offer `batch(indices: int array [n]) -> stacked examples`; it is used instead of n calls of `source[i]`.
"""

import functools
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from efficient_attn.tasks.base import Example, Source, TaskError

Batch = dict[str, np.ndarray]  # a stacked Example: every array with a leading axis of rows
Batches = Generator[Batch, None, None]


@runtime_checkable
class StreamSource(Protocol):
    """A source of contiguous streams: each row of a batch continues the same row of the batch before.

    Train rows are read where `order` says; of an evaluation split of n examples, row r has examples r ceil(n/B) and following.
    """

    contiguous: bool

    def order(self, seed: int, batch_size: int) -> "Order": ...


@runtime_checkable
class Order(Protocol):
    """The endless sequence of example indices."""

    def __getitem__(self, positions: slice) -> np.ndarray: ...


@runtime_checkable
class BatchSource(Protocol):
    """A source that makes many examples at once, equal to the stacked `source[i]`."""

    def batch(self, indices: np.ndarray) -> Batch: ...


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int | Sequence[int],
    start_step: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """The endless training stream from batch `start_step` on; this process's rows of it.

    `batch_size` is that of the global batch; process p of n gets the contiguous rows [p B / n, (p + 1) B / n).
    Arrays are [B, ...]; of several seeds, or a sequence of one, [B, N, ...], each one's stream the one it has alone.
    `prefetch` counts batches held ready; 0 reads in the caller's thread. An error in the source is raised by `next`.
    Closing the generator (`.close()`, `contextlib.closing`) stops the threads after the reads they are in.

    Raises:
        ValueError: the batch does not divide among the processes, or an argument is out of range.
        TaskError: the source is empty.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    seeds = [seed] if isinstance(seed, int) else seed
    if not seeds or not all(0 <= s < 2**64 for s in seeds) or start_step < 0:
        raise ValueError(f"seed must be in [0, 2^64) and start_step >= 0; got {seed=}, {start_step=}")
    orders = [order_of(source, seed, batch_size) for seed in seeds]

    def read(step: int) -> Batch:
        first = step * batch_size
        batches = [read_rows(source, order[first + rows.start : first + rows.stop]) for order in orders]
        return batches[0] if isinstance(seed, int) else {key: np.stack([b[key] for b in batches], axis=1) for key in batches[0]}

    return _prefetched(read, range(start_step, sys.maxsize), num_threads, prefetch)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    num_threads: int = 2,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Every example of `source` once, as `steps_per_epoch` batches of equal shape; this process's rows of them.

    In order; of streams, each row in its own order.
    Rows past the end are all zero, weights too, so that weighted sums over the batches are exact.
    Arguments and errors as in `train_batches`.
    """
    rows = _process_rows(batch_size, process_index, process_count)
    length = _length(source)
    steps = steps_per_epoch(length, batch_size)

    def read(step: int) -> Batch:
        indices = np.arange(rows.start, rows.stop)
        indices = indices * steps + step if isinstance(source, StreamSource) else indices + step * batch_size
        batch = read_rows(source, np.minimum(indices, length - 1))
        real = int(np.sum(indices < length))
        if real < len(indices):
            batch = {key: np.concatenate([value[:real], np.zeros_like(value[real:])]) for key, value in batch.items()}
        return batch

    return _prefetched(read, range(steps), num_threads, prefetch)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches after which every example has been seen: num_examples / batch_size, rounded up."""
    return -(-num_examples // batch_size)


def read_rows(source: Source, indices: np.ndarray) -> Batch:
    """The examples at `indices`, stacked along a new first axis."""
    if isinstance(source, BatchSource):
        return source.batch(indices)
    examples: list[Example] = [source[int(index)] for index in indices]
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def order_of(source: Source, seed: int, batch_size: int) -> Order:
    """What training reads, a pure function of its arguments: epochs that are shuffled, or contiguous streams."""
    length = _length(source)
    return source.order(seed, batch_size) if isinstance(source, StreamSource) else ShuffledEpochs(length, seed)


class ShuffledEpochs:
    """The endless sequence of example indices: epoch e is a uniform permutation of range(length), keyed by (seed, e).

    Holds the permutations of the two epochs read last, 4 bytes per example each, and takes about 40 ns per example to make
    one. (A keyed bijection such as grain's `index_shuffle` needs no memory, but is less uniform and costs more per batch.)
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        permutation = np.arange(self.length, dtype=np.uint32 if self.length <= 2**32 else np.uint64)
        np.random.Generator(np.random.Philox(key=[self.seed, epoch])).shuffle(permutation)
        return permutation

    def __getitem__(self, positions: slice) -> np.ndarray:
        epochs, offsets = np.divmod(np.arange(positions.start, positions.stop), self.length)
        return np.concatenate([self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])


class _Reads:
    """`read` at each of `steps`, as the random-access source that grain reads."""

    def __init__(self, read: Callable[[int], Batch], steps: range):
        self.read, self.steps = read, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Batch:
        return self.read(self.steps[index])


def _prefetched(read: Callable[[int], Batch], steps: range, num_threads: int, prefetch: int) -> Batches:
    options = grain.ReadOptions(num_threads=min(num_threads, prefetch), prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.source(_Reads(read, steps)).to_iter_dataset(options)

    def generate() -> Batches:
        iterator = iter(dataset)
        try:
            yield from iterator
        finally:
            iterator.close()

    return generate()


def _process_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a global batch that belong to one process."""
    if batch_size < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size must be at least 1 and process_index in [0, process_count); "
            f"got {batch_size=}, {process_index=}, {process_count=}"
        )
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} does not divide among {process_count} processes; use a multiple")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _length(source: Source) -> int:
    if len(source) == 0:
        raise TaskError("The source has no examples; a split needs at least one. Check num_examples or the data files.")
    return len(source)
