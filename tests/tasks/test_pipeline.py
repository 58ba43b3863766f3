"""The input pipeline: purity in (seed, step), full shuffles, process rows, padding, threads, errors."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest

from efficient_attn.tasks import pipeline
from efficient_attn.tasks.base import TaskError


class Numbers:
    """Example i is the number i at each of `width` positions."""

    def __init__(self, length, width=3):
        self.length, self.width = length, width

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {
            "inputs": np.full(self.width, index, np.int32),
            "mask": np.ones(self.width, bool),
            "targets": np.int32(index),
            "weights": np.float32(1.0),
        }


class Vectorised(Numbers):
    """The same examples, made a batch at a time; `source[i]` fails so that a test sees which way was taken."""

    def __getitem__(self, index):
        raise AssertionError("read one by one")

    def batch(self, indices):
        inputs = np.repeat(np.asarray(indices, np.int32)[:, None], self.width, axis=1)
        ones = np.ones(len(indices), np.float32)
        return {"inputs": inputs, "mask": np.ones(inputs.shape, bool), "targets": inputs[:, 0], "weights": ones}


def take(batches, count):
    with contextlib.closing(batches):
        return list(itertools.islice(batches, count))


def targets(batches, count):
    return np.stack([batch["targets"] for batch in take(batches, count)])


def test_shapes_and_dtypes():
    (batch,) = take(pipeline.train_batches(Numbers(10), batch_size=4, seed=0), 1)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "inputs": ((4, 3), "int32"),
        "mask": ((4, 3), "bool"),
        "targets": ((4,), "int32"),
        "weights": ((4,), "float32"),
    }


@pytest.mark.parametrize(("length", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 5)])
def test_every_epoch_is_a_fresh_full_shuffle(length, batch_size):
    stream = targets(pipeline.train_batches(Numbers(length), batch_size=batch_size, seed=1), 6 * length).ravel()
    epochs = stream[: len(stream) // length * length].reshape(-1, length)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(length), (len(epochs), 1)))
    if length > 1:
        assert len(np.unique(epochs, axis=0)) > 1


def test_shuffles_are_uniform():
    order = pipeline.ShuffledEpochs(3, seed=5)
    permutations, counts = np.unique(order[0 : 3 * 6000].reshape(-1, 3), axis=0, return_counts=True)
    assert len(permutations) == 6
    assert np.sum((counts - 1000) ** 2 / 1000) < 20.5  # chi-square with 5 degrees of freedom, p = 0.001


def test_seeds_and_epochs_give_different_orders():
    orders = [pipeline.ShuffledEpochs(1000, seed)[1000 * epoch : 1000 * epoch + 1000] for seed in (1, 2) for epoch in (0, 1)]
    assert all(np.mean(a == b) < 0.05 for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("start", [1, 7, 1000, 10**9])
def test_a_stream_can_start_anywhere(start):
    kwargs = {"batch_size": 4, "seed": 3}
    whole = targets(pipeline.train_batches(Numbers(10), start_step=start - 1, **kwargs), 8)
    resumed = targets(pipeline.train_batches(Numbers(10), start_step=start, num_threads=1, prefetch=0, **kwargs), 7)
    np.testing.assert_array_equal(whole[1:], resumed)


def test_starting_late_equals_reading_through():
    whole = targets(pipeline.train_batches(Numbers(10), batch_size=4, seed=3), 30)
    np.testing.assert_array_equal(
        whole[23:], targets(pipeline.train_batches(Numbers(10), batch_size=4, seed=3, start_step=23), 7)
    )


@pytest.mark.parametrize("make", [pipeline.train_batches, pipeline.eval_batches])
def test_processes_share_the_rows_of_the_same_global_batch(make):
    kwargs = dict(batch_size=6, **({"seed": 0} if make is pipeline.train_batches else {}))
    whole = take(make(Numbers(13), **kwargs), 3)
    parts = [take(make(Numbers(13), process_index=p, process_count=3, **kwargs), 3) for p in range(3)]
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(value, np.concatenate([part[step][key] for part in parts]))


@pytest.mark.parametrize("cls", [Numbers, Vectorised])
def test_evaluation_sees_each_example_once_and_pads_with_nothing(cls):
    batches = list(pipeline.eval_batches(cls(10), batch_size=4))
    assert len(batches) == pipeline.steps_per_epoch(10, 4) == 3
    assert all(batch["inputs"].shape == (4, 3) for batch in batches)
    weights = np.concatenate([batch["weights"] for batch in batches])
    np.testing.assert_array_equal(weights, [1] * 10 + [0] * 2)
    np.testing.assert_array_equal(np.concatenate([batch["targets"] for batch in batches])[:10], np.arange(10))
    assert all(not np.any(value[2:]) for value in batches[-1].values())


def test_a_vectorised_source_gives_the_same_stream():
    kwargs = {"batch_size": 4, "seed": 9}
    one_by_one = take(pipeline.train_batches(Numbers(10), **kwargs), 6)
    at_once = take(pipeline.train_batches(Vectorised(10), **kwargs), 6)
    for a, b in zip(one_by_one, at_once, strict=True):
        assert all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    batches = pipeline.train_batches(Numbers(100), batch_size=4, seed=0)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)


def test_batches_are_read_ahead():
    read = []

    class Slow(Numbers):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    with contextlib.closing(pipeline.train_batches(Slow(100), batch_size=1, seed=0, prefetch=4)) as batches:
        next(batches)
        deadline = time.monotonic() + 5
        while len(read) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(read) == 5  # the one returned, and `prefetch` more


def test_an_error_in_the_source_reaches_the_caller():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise TaskError("shard 3 is damaged")

    with pytest.raises(TaskError, match="shard 3 is damaged"):
        take(pipeline.train_batches(Broken(10), batch_size=2, seed=0), 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size=6 does not divide among 4 processes"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "process_index"),
        ({"batch_size": 4, "seed": -1}, "seed must be"),
        ({"batch_size": 4, "start_step": -1}, "start_step"),
    ],
)
def test_wrong_arguments_fail_at_the_call(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline.train_batches(Numbers(10), **{"seed": 0, **kwargs})


@pytest.mark.parametrize("make", [pipeline.train_batches, pipeline.eval_batches])
def test_an_empty_source_is_an_error(make):
    with pytest.raises(TaskError, match="no examples"):
        make(Numbers(0), batch_size=4, **({"seed": 0} if make is pipeline.train_batches else {}))
