"""Contiguous streams: every row goes on where it stopped, every token is read, documents are numbered for good."""

import itertools

import numpy as np
import pytest

from efficient_attn.tasks import pipeline
from efficient_attn.tasks.base import TaskError
from efficient_attn.tasks.lm_text import LMText
from efficient_attn.tasks.windows import EvaluationStreams, Streams

DATA = np.random.default_rng(0).integers(1, 200, 61).astype(np.uint8)
DATA[[10, 11, 40]] = 0
CONTEXT, ROWS = 4, 3


def batches(source, seed, start, count):
    stream = pipeline.train_batches(source, batch_size=ROWS, seed=seed, start_step=start, prefetch=0)
    return [next(stream) for _ in range(count)]


def test_each_row_continues_the_row_before_and_batches_are_pure_functions_of_seed_and_step():
    source = Streams(DATA, CONTEXT, documents=True)
    steps = batches(source, seed=5, start=0, count=40)
    for a, b in itertools.pairwise(steps):
        np.testing.assert_array_equal(a["targets"][:, -1], b["inputs"][:, 0])
        assert np.all(b["segment_ids"][:, 0] >= a["segment_ids"][:, -1])
    for a, b in zip(steps[7:], batches(source, seed=5, start=7, count=33)):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    assert any(not np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(steps, batches(source, 7, 0, 3)))


def test_a_row_reads_the_text_round_and_round():
    """The row's tokens are the circle's; a new round is a new document, and only the target across the seam counts nothing."""
    steps = batches(Streams(DATA, CONTEXT, documents=True), seed=1, start=0, count=40)
    tokens, targets, weights, ids = (
        np.concatenate([b[k] for b in steps], axis=1) for k in ("inputs", "targets", "weights", "segment_ids")
    )
    start = next(s for s in range(len(DATA)) if np.array_equal(np.resize(np.roll(DATA, -s), len(tokens[0])), tokens[0]))
    np.testing.assert_array_equal(tokens[0][1:], targets[0][:-1])
    places = (start + np.arange(len(tokens[0]))) % len(DATA)
    np.testing.assert_array_equal(weights[0] == 0, places == len(DATA) - 1)
    is_new = np.concatenate([[False], np.diff(ids[0]) > 0])
    np.testing.assert_array_equal(is_new[1:], ((tokens[0] == 0) | (places == 0))[1:])


def test_evaluation_rows_are_contiguous_and_read_every_window_once():
    source = EvaluationStreams(DATA, CONTEXT, span=60, count=15, documents=True)
    steps = list(pipeline.eval_batches(source, batch_size=4, prefetch=0))
    rows = np.concatenate([b["inputs"] for b in steps], axis=1)
    np.testing.assert_array_equal(rows.reshape(-1)[:60], DATA[:60])
    assert len(steps) == 4 and np.sum([b["weights"].sum() for b in steps]) == 60 and not np.any(rows.reshape(-1)[60:])
    with pytest.raises(TaskError, match="evaluation"):
        source.order(0, 4)


def test_task_of_streams_and_documents(tmp_path):
    root = tmp_path / "documents"
    root.mkdir()
    for number in range(40):
        (root / f"{number}.txt").write_text(f"document {number} " * (4 + number))
    task = LMText(path=str(root), context=8, order="streams", documents=True, data_dir=str(tmp_path / "data"))
    task.prepare()
    assert task.packed and task.contiguous and task.name.endswith("-streams-documents")
    example = task.source("valid")[0]
    text = (task.folder / "valid.bin").read_bytes()
    np.testing.assert_array_equal(example["segment_ids"], [text[: i + 1].count(0) for i in range(8)])
    assert task.sizes["train"] == len((task.folder / "train.bin").read_bytes()) // 8
    for fields in (dict(order="sideways"), dict(order="streams", num_examples=3)):
        with pytest.raises(TaskError, match="order"):
            LMText(**fields)
