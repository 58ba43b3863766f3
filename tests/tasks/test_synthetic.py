"""Synthetic tasks: the random streams, the distributions against their definitions, purity, splits, bad input."""

import dataclasses
import hashlib
import itertools
import os
import re

import numpy as np
import pytest
from scipy import stats

from efficient_attn.tasks import synthetic
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.synthetic import Draws, InductionHeads, MultiQueryRecall, SelectiveCopying

MANY = np.arange(20_000)
TASKS = [
    MultiQueryRecall(num_examples=500, num_eval=100),
    MultiQueryRecall(num_examples=500, num_eval=100, length=128, num_pairs=32, vocab_size=130, random_non_queries=True),
    InductionHeads(num_examples=500, num_eval=100, length=64),
    SelectiveCopying(num_examples=500, num_eval=100, length=80, num_tokens=8),
]
DIGESTS = ["d1d68bc145b8189f", "d5ec067ac1dd30b6", "6dce4ddefdf14e0e", "accc4253f19837dd"]


def rejected(counts, expected):
    """Whether a chi-square test rejects the expected counts at p = 1e-4."""
    return stats.chisquare(counts, np.asarray(expected) / np.sum(expected) * np.sum(counts)).pvalue < 1e-4


def test_the_streams_are_splitmix64():
    """First outputs for the seed 1234567, as published with the algorithm's reference implementation."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * synthetic.GAMMA
    assert synthetic._mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_numbers_are_uniform_and_independent_along_rows_and_columns():
    numbers = Draws(1, np.arange(300)).uniform(300)
    assert np.min(numbers) >= 0 and np.max(numbers) < 1
    cells = (numbers * 8).astype(int)
    assert not rejected(np.bincount(cells.ravel(), minlength=8), np.ones(8))
    for a, b in [(cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])]:
        assert not rejected(np.bincount((8 * a + b).ravel(), minlength=64), np.ones(64))


def test_distinct_is_uniform_over_ordered_samples():
    samples = Draws(2, MANY).distinct(5, 3)
    counts = [np.sum(np.all(samples == sample, axis=1)) for sample in itertools.permutations(range(5), 3)]
    assert sum(counts) == len(MANY)
    assert not rejected(counts, np.ones(60))


def test_distinct_can_take_everything():
    assert np.array_equal(np.sort(Draws(0, np.arange(50)).distinct(7, 7)), np.tile(np.arange(7), (50, 1)))


def test_weighted_draws_one_after_another_without_replacement():
    weights = np.array([5.0, 3.0, 2.0])
    samples = Draws(3, MANY).weighted(weights, 2)
    pairs = list(itertools.permutations(range(3), 2))
    expected = [weights[a] / 10 * weights[b] / (10 - weights[a]) for a, b in pairs]
    assert not rejected([np.sum((samples[:, 0] == a) & (samples[:, 1] == b)) for a, b in pairs], expected)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.slug)
class TestEveryTask:
    def test_examples_have_the_shapes_of_the_interface(self, task):
        for split in SPLITS:
            source = task.source(split)
            assert len(source) == task.sizes[split]
            example = source[len(source) - 1]
            assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
                "inputs": ((task.length,), "int32"),
                "targets": ((task.length,), "int32"),
                "weights": ((task.length,), "float32"),
            }
            batch = source.batch(np.arange(len(source)))
            assert np.min(batch["inputs"]) >= 0 and np.max(batch["inputs"]) < task.vocab_size
            assert np.all(np.isin(batch["weights"], [0, 1])) and np.all(batch["weights"].sum(axis=1) >= 1)

    def test_an_example_depends_on_nothing_but_its_index(self, task):
        source = task.source("train")
        batch = source.batch(np.array([7, 3, 499]))
        for row, index in enumerate([7, 3, 499]):
            for key, value in dataclasses.replace(task).source("train")[index].items():
                np.testing.assert_array_equal(value, batch[key][row])

    def test_splits_and_seeds_share_no_example(self, task):
        tasks = [task, dataclasses.replace(task, seed=1)]
        sources = [task.source(split) for task in tasks for split in SPLITS]
        drawn = [row.tobytes() for source in sources for row in source.batch(np.arange(len(source)))["inputs"]]
        assert len(set(drawn)) == len(drawn) == 2 * (500 + 100 + 100)

    def test_the_name_holds_every_field(self, task):
        for field in dataclasses.fields(task):
            value = getattr(task, field.name)
            other = object.__new__(type(task))
            for each in dataclasses.fields(task):
                object.__setattr__(other, each.name, getattr(task, each.name))
            object.__setattr__(other, field.name, value + 1)
            assert other.name != task.name
        assert re.fullmatch(r"[\w.-]+", task.name)

    def test_nothing_is_written(self, task, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        task.prepare()
        assert "no files" in task.cost() and os.listdir() == []

    @pytest.mark.parametrize("index", [-1, 500])
    def test_an_index_outside_is_an_error(self, task, index):
        with pytest.raises(IndexError, match=r"\[0, 500\)"):
            task.source("train")[index]


@pytest.mark.parametrize(("task", "digest"), list(zip(TASKS, DIGESTS, strict=True)), ids=[task.slug for task in TASKS])
def test_examples_are_what_they_always_were(task, digest):
    """Equal names promise equal examples, on any machine and version of NumPy."""
    batch = task.source("test").batch(np.arange(10))
    batch["mask"] = np.ones(batch["inputs"].shape, bool)  # which examples once had
    assert hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest()[:16] == digest


@pytest.mark.parametrize("task", TASKS[:2], ids=["filler 0", "filler random"])
def test_multi_query_recall_is_solved_by_looking_up_each_query(task):
    batch = task.source("train").batch(np.arange(200))
    half, pairs = task.vocab_size // 2, 2 * task.num_pairs
    for inputs, targets, weights in zip(batch["inputs"], batch["targets"], batch["weights"]):
        keys, values = inputs[:pairs:2], inputs[1:pairs:2]
        assert len(set(keys)) == len(set(values)) == task.num_pairs
        assert np.min(keys) >= 1 and np.max(keys) < half <= np.min(values)
        queries = np.flatnonzero(weights)
        assert np.all(queries % 2 == 0) and np.min(queries) >= pairs
        assert sorted(inputs[queries]) == sorted(keys)  # each asked once
        table = dict(zip(keys, values))
        np.testing.assert_array_equal(targets[queries], [table[key] for key in inputs[queries]])
        if not task.random_non_queries:
            assert not np.any(np.delete(inputs[pairs:], queries - pairs))


def test_multi_query_recall_asks_in_slots_by_the_power_law():
    task = MultiQueryRecall(length=24, num_pairs=4, num_examples=len(MANY))
    inputs = task.source("train").batch(MANY)["inputs"]
    slots = inputs[:, 8::2]
    first_key = np.argmax(slots == inputs[:, :1], axis=1)  # the first key's slot is drawn first
    assert not rejected(np.bincount(first_key, minlength=8), np.arange(1, 9) ** (0.01 - 1))


def test_induction_heads_asks_for_the_token_after_the_trigger():
    task = InductionHeads(length=16, vocab_size=8, num_examples=len(MANY))
    batch = task.source("train").batch(MANY)
    rows, triggers = np.nonzero(batch["inputs"] == 7)
    triggers = triggers.reshape(-1, 2)
    assert np.all(rows == np.repeat(MANY, 2)) and np.all(triggers[:, 1] == 15)
    assert not rejected(np.bincount(triggers[:, 0], minlength=13), np.ones(13))  # planted at 0..L-4
    np.testing.assert_array_equal(batch["targets"][:, -1], batch["inputs"][MANY, triggers[:, 0] + 1])
    assert not rejected(np.bincount(batch["targets"][:, -1], minlength=7), np.ones(7))
    assert np.all(batch["weights"][:, -1] == 1) and not np.any(batch["weights"][:, :-1])


def test_selective_copying_asks_for_the_data_in_order():
    task = SelectiveCopying(length=12, vocab_size=6, num_tokens=2, num_examples=len(MANY))
    batch = task.source("train").batch(MANY)
    inputs, answers = batch["inputs"], batch["targets"][:, -2:]
    assert np.all(inputs[:, -2:] == 5) and np.all(inputs[:, :-2] < 5)
    places = np.nonzero(inputs[:, :-2])[1].reshape(-1, 2)
    np.testing.assert_array_equal(np.take_along_axis(inputs, places, axis=1), answers)
    np.testing.assert_array_equal(batch["weights"], np.tile([0] * 10 + [1] * 2, (len(MANY), 1)))
    expected = np.triu(np.ones((10, 10)), 1)  # each of the pairs of places as likely
    counts = np.zeros((10, 10))
    np.add.at(counts, (places[:, 0], places[:, 1]), 1)
    assert not rejected(counts[expected > 0], expected[expected > 0])
    assert not rejected(np.bincount((answers[:, 0] - 1) * 4 + answers[:, 1] - 1, minlength=16), np.ones(16))


def test_floors_are_what_guessing_reaches():
    recall = MultiQueryRecall(length=24, num_pairs=4, vocab_size=32, num_examples=len(MANY))
    batch = recall.source("train").batch(MANY)
    targets = batch["targets"][batch["weights"] > 0].reshape(-1, 4)
    assert np.mean(targets == 20) == pytest.approx(recall.floors["any value"], abs=0.005)
    assert np.mean(targets == batch["inputs"][:, 1:2]) == pytest.approx(recall.floors["any value of the example"], abs=0.005)
    for task in (InductionHeads(length=16, num_examples=len(MANY)), SelectiveCopying(length=40, num_examples=len(MANY))):
        batch = task.source("train").batch(MANY)
        (floor,) = task.floors.values()
        assert np.mean(batch["targets"][batch["weights"] > 0] == 3) == pytest.approx(floor, abs=0.005)


@pytest.mark.parametrize(
    "task",
    [
        InductionHeads(length=6, vocab_size=5, num_examples=1000, num_eval=2000),
        SelectiveCopying(length=10, vocab_size=6, num_tokens=3, num_examples=1000, num_eval=2000),
        MultiQueryRecall(length=16, vocab_size=18, num_pairs=2, power=1.0, num_examples=100_000, num_eval=2000),
    ],
    ids=lambda task: task.slug,
)
def test_cost_says_how_many_test_examples_occur_in_train(task):
    train, test = (task.source(split).batch(np.arange(task.sizes[split]))["inputs"] for split in ("train", "test"))
    known = {row.tobytes() for row in train}
    seen = np.mean([row.tobytes() in known for row in test])
    stated = float(re.search(r"about (\S+) of the test", task.cost())[1])
    assert 0.05 < seen < 0.95 and stated == pytest.approx(seen, rel=0.2)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (MultiQueryRecall, {"num_pairs": 17}, "4 num_pairs <= length"),
        (MultiQueryRecall, {"vocab_size": 64}, "length < vocab_size"),
        (MultiQueryRecall, {"length": 65}, "even"),
        (InductionHeads, {"length": 3}, "length must be at least 4"),
        (SelectiveCopying, {"length": 31}, "2 num_tokens"),
        (InductionHeads, {"num_examples": 0}, "num_examples"),
        (InductionHeads, {"seed": -1}, "seed"),
    ],
)
def test_contradictory_fields_are_errors(cls, fields, message):
    with pytest.raises(TaskError, match=message):
        cls(**fields)
