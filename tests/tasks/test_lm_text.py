"""Byte-level text: windows, splits, the copy on disk, identity, bad input."""

import dataclasses
import os
import pathlib
import sysconfig
import threading

import numpy as np
import pytest

from efficient_attn.tasks import lm_text, pipeline
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.lm_text import LMText

TEXT = "".join(f"Line {number} of the text, {number * number} é.\n" for number in range(200)).encode()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def folder(tmp_path):
    """60 documents of 60 sizes, below two levels of folders, and what is to be left out."""
    root = tmp_path / "documents"
    for number in range(60):
        path = root / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"document {number} ".encode() * (10 + number))
    (root / ".hidden").mkdir()
    (root / ".hidden" / "secret.txt").write_text("SECRET" * 100)
    (root / ".gitignore").write_text("SECRET" * 100)
    (root / "empty.txt").write_text("")
    return root


def prepared(tmp_path, path, **fields):
    task = LMText(path=str(path), data_dir=str(tmp_path / "data"), **{"context": 16, **fields})
    task.prepare()
    return task


def split_bytes(task):
    return {split: (task.folder / f"{split}.bin").read_bytes() for split in SPLITS}


def as_bytes(tokens):
    return np.asarray(tokens).astype(np.uint8).tobytes()


def test_train_has_the_window_at_every_offset(tmp_path, file):
    task = prepared(tmp_path, file)
    source, text = task.source("train"), split_bytes(task)["train"]
    assert len(source) == task.sizes["train"] == len(text) - 16
    for start in (0, 1, 1000, len(source) - 1):
        example = source[start]
        assert as_bytes(example["inputs"]) == text[start : start + 16]
        assert as_bytes(example["targets"]) == text[start + 1 : start + 17]
        assert np.all(example["weights"] == 1)
    assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
        "inputs": ((16,), "int32"),
        "targets": ((16,), "int32"),
        "weights": ((16,), "float32"),
    }


def test_num_examples_takes_equally_spaced_offsets(tmp_path, file):
    task = prepared(tmp_path, file, num_examples=10)
    source, text = task.source("train"), split_bytes(task)["train"]
    starts = [text.index(as_bytes(source[i]["inputs"])) for i in range(len(source))]
    assert len(source) == task.sizes["train"] == 10
    assert starts == [i * (len(text) - 16) // 10 for i in range(10)]


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("context", [7, 16, 1000])
def test_evaluation_predicts_every_byte_but_the_first_once(tmp_path, file, split, context):
    task = prepared(tmp_path, file, context=context)
    batches = list(pipeline.eval_batches(task.source(split), batch_size=4))
    inputs, targets, weights = (np.concatenate([batch[key] for batch in batches]) for key in ("inputs", "targets", "weights"))
    real = weights > 0
    text = split_bytes(task)[split]
    assert as_bytes(targets[real]) == text[1:]
    assert as_bytes(inputs[real]) == text[:-1]
    assert not np.any(inputs[~real]) and not np.any(targets[~real])
    assert len(task.source(split)) == task.sizes[split]
    assert dataclasses.replace(task, context=len(text) - 1).sizes[split] == 1


def test_a_batch_is_its_stacked_examples(tmp_path, file):
    for split in SPLITS:
        source = prepared(tmp_path, file).source(split)
        indices = np.array([len(source) - 1, 0, 3])
        for key, value in source.batch(indices).items():
            np.testing.assert_array_equal(value, np.stack([source[int(index)][key] for index in indices]))
            assert value.dtype == source[0][key].dtype
        with pytest.raises(IndexError):
            source[len(source)]


def test_a_file_is_cut_in_three(tmp_path, file):
    parts = split_bytes(prepared(tmp_path, file, valid_fraction=0.1, test_fraction=0.2))
    assert parts["train"] + parts["valid"] + parts["test"] == TEXT
    assert len(parts["valid"]) == pytest.approx(0.1 * len(TEXT), abs=1)
    assert len(parts["test"]) == pytest.approx(0.2 * len(TEXT), abs=1)


def test_a_folder_that_names_its_splits_is_taken_at_its_word(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(f"This is the {split} split. " * 3)
    (tmp_path / "README").write_text("not part of it")
    assert split_bytes(prepared(tmp_path, tmp_path)) == {s: f"This is the {s} split. ".encode() * 3 for s in SPLITS}


def test_a_folder_is_split_by_documents(tmp_path, folder):
    parts = split_bytes(prepared(tmp_path, folder, valid_fraction=0.15, test_fraction=0.1))
    documents = [document for part in parts.values() for document in part.split(b"\0")]
    expected = [f"document {number} ".encode() * (10 + number) for number in range(60)]
    assert sorted(documents) == sorted(expected)
    total = sum(map(len, expected))
    for split, fraction in {"valid": 0.15, "test": 0.1}.items():
        assert 0.8 * fraction * total < len(parts[split].replace(b"\0", b"")) <= fraction * total
        numbers = [int(document.split()[1]) for document in parts[split].split(b"\0")]
        assert min(numbers) < 30 <= max(numbers)  # neither the smallest nor the largest files


def test_copies_of_a_file_are_in_one_split(tmp_path, folder):
    for path in sorted(folder.glob("part*/*.txt")):
        (folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    parts = split_bytes(prepared(tmp_path, folder, valid_fraction=0.2, test_fraction=0.2))
    documents = [set(part.split(b"\0")) for part in parts.values()]
    assert sum(map(len, documents)) == len(set.union(*documents)) == 60


def test_the_default_corpus_is_the_standard_library(tmp_path, monkeypatch):
    task = LMText()
    assert sum(task._bytes.values()) > 5e6 and task.sizes["train"] == lm_text.MAX_EXAMPLES
    assert task.length == 256 and task.vocab_size == task.num_outputs == 256
    paths = {piece.path for pieces in task._pieces.values() for piece in pieces}
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    assert root / "json" / "decoder.py" in paths
    kept = {"argparse.py": 9000, "email/parser.py": 500, "email/header.py": 400}
    left_out = ["site-packages/a.py", "test/b.py", "email/tests/c.py", "lib.so", "_sysconfigdata__x86.py", "notes.txt"]
    for name in [*kept, *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * kept.get(name, 10))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = {p.path.relative_to(tmp_path).as_posix() for pieces in LMText()._pieces.values() for p in pieces}
    assert found == set(kept)


def test_names_tell_data_apart(tmp_path, file, folder):
    task = LMText(path=str(file), context=16)
    changes = [{"context": 17}, {"num_examples": 5}, {"valid_fraction": 0.1}, {"test_fraction": 0.1}, {"path": str(folder)}]
    names = [task.name, *(dataclasses.replace(task, **change).name for change in changes)]
    assert len(set(names)) == len(names)
    assert dataclasses.replace(task, data_dir="elsewhere").name == task.name
    assert dataclasses.replace(task, context=17).folder == task.folder
    file.write_bytes(TEXT.replace(b"Line 7", b"Lime 7"))
    assert LMText(path=str(file), context=16).name != task.name


def test_the_same_folder_elsewhere_has_the_same_name(tmp_path, folder):
    name = LMText(path=str(folder)).name
    (tmp_path / "moved").mkdir()
    assert LMText(path=str(folder.rename(tmp_path / "moved" / folder.name))).name == name


def test_constructing_and_asking_write_nothing(tmp_path, file):
    before = sorted(tmp_path.rglob("*"))
    LMText(path=str(tmp_path / "missing"))
    task = LMText(path=str(file), data_dir=str(tmp_path / "data"))
    assert "to be copied" in task.cost() and sum(task.sizes.values()) > 0 and task.name
    assert sorted(tmp_path.rglob("*")) == before
    task.prepare()
    assert "prepared in" in task.cost()


def test_preparing_again_changes_nothing(tmp_path, file):
    task = prepared(tmp_path, file)
    times = [path.stat().st_mtime_ns for path in sorted(task.folder.iterdir())]
    prepared(tmp_path, file)
    assert [path.stat().st_mtime_ns for path in sorted(task.folder.iterdir())] == times


def test_what_a_killed_call_left_is_replaced(tmp_path, file):
    task = prepared(tmp_path, file)
    whole = split_bytes(task)
    (task.folder / "train.bin").unlink()
    (task.folder / "incomplete.train.bin").write_bytes(b"half")
    prepared(tmp_path, file)
    assert split_bytes(task) == whole
    assert sorted(path.name for path in task.folder.iterdir()) == [".lock", "test.bin", "train.bin", "valid.bin"]


def test_several_may_prepare_at_once(tmp_path, file):
    errors = []

    def prepare():
        try:
            prepared(tmp_path, file)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and b"".join(split_bytes(prepared(tmp_path, file)).values()) == TEXT


def test_a_full_disk_is_an_error_and_leaves_nothing_half_done(tmp_path, file, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TaskError, match="No space left"):
        patch.setattr(os, "fsync", full)
        prepared(tmp_path, file)
    assert list(tmp_path.glob("data/*/*.bin")) == []
    assert b"".join(split_bytes(prepared(tmp_path, file)).values()) == TEXT


def test_a_damaged_copy_is_an_error(tmp_path, file):
    task = prepared(tmp_path, file)
    os.truncate(task.folder / "valid.bin", 10)
    for use in (task.prepare, task.cost, lambda: task.source("train")):
        with pytest.raises(TaskError, match="is damaged"):
            use()


def test_a_corpus_that_changes_meanwhile_is_an_error(tmp_path, file):
    task = LMText(path=str(file), data_dir=str(tmp_path / "data"))
    assert task.name
    file.write_bytes(TEXT.replace(b"Line 7", b"Lime 7"))
    with pytest.raises(TaskError, match="changed while"):
        task.prepare()
    assert list(tmp_path.glob("data/*/*.bin")) == []


def test_reading_before_preparing_is_an_error(tmp_path, file):
    with pytest.raises(TaskError, match="prepare"):
        LMText(path=str(file), data_dir=str(tmp_path / "data")).source("train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no text files"),
        ({"a.txt": b""}, "no text files"),
        ({"train.txt": b"text" * 9, "valid.txt": b"te\0xt", "test.txt": b"text"}, "valid.txt holds a zero byte"),
        ({"a.txt": b"text" * 100}, "valid split .* has 0 bytes"),
        ({"train.txt": b"text" * 100, "test.txt": b"text" * 100}, "all or none"),
        ({"train.txt": b"text" * 4, "valid.txt": b"text", "test.txt": b"text"}, "train split .* has 16 bytes and needs 17"),
        ({"train.txt": b"text" * 9, "valid.txt": b"t", "test.txt": b"text"}, "valid split .* has 1 bytes and needs 2"),
    ],
)
def test_a_folder_that_will_not_do(tmp_path, files, message):
    root = tmp_path / "corpus"
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        prepared(tmp_path, root, valid_fraction=0.3, test_fraction=0.45)


@pytest.mark.parametrize("use", [lambda task: task.sizes, lambda task: task.name, LMText.cost, LMText.prepare])
def test_a_missing_path_is_an_error(tmp_path, use):
    with pytest.raises(TaskError, match=r"no file or folder .*nowhere"):
        use(LMText(path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "fields", [{"context": 0}, {"num_examples": -1}, {"valid_fraction": 0.0}, {"valid_fraction": 0.5, "test_fraction": 0.5}]
)
def test_contradictory_fields_are_errors(fields):
    with pytest.raises(TaskError, match="lm_text: "):
        LMText(**fields)
