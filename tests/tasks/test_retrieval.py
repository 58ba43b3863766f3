"""Retrieval: rows are read whole whatever the quoting and sharding, and become pairs of byte sequences."""

import csv
import tarfile

import numpy as np
import pytest

from efficient_attn.tasks import retrieval
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.retrieval import TSV_FILES, Retrieval, read_pairs

SIZES = {"num_examples": 9, "num_valid": 4, "num_test": 3}


def rows(split):
    """(label, text1, text2): lengths differ, and so do the places of quotation marks and of letters of two bytes."""
    start = 100 * SPLITS.index(split)
    count = {"train": 9, "valid": 4, "test": 3}[split]
    return [(i % 2, f'"Über" {start + i} ' + "la " * i, f"{start + i} '\\n' é\"" + "lo " * (9 - i)) for i in range(count)]


def write_plain(path, pairs):
    lines = [f"{label:.1f}\tP{i}\tQ{i}\t{text1}\t{text2}\n" for i, (label, text1, text2) in enumerate(pairs)]
    path.write_text("".join(lines))


def write_quoted(path, pairs):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerows([float(label), f"P{i}", f"Q{i}", text1, text2] for i, (label, text1, text2) in enumerate(pairs))


def as_bytes(pairs):
    return [(label, text1.encode(), text2.encode()) for label, text1, text2 in pairs]


def write_release(folder):
    folder.mkdir(parents=True)
    for split, name in TSV_FILES.items():
        write_plain(folder / name, rows(split))


def decoded(task, split):
    source = task.source(split)
    pairs = []
    for example in (source[i] for i in range(len(source))):
        texts = [(tokens[mask] - 1).astype(np.uint8).tobytes() for tokens, mask in zip(example["inputs"], example["mask"])]
        pairs.append((int(example["targets"]), *texts))
    return pairs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The task, prepared from the release's archive, which holds the TSV files two folders deep."""
    folder = tmp_path_factory.mktemp("retrieval")
    write_release(folder / "staging" / "tsv_data")
    (folder / "staging" / "tsv_data" / "new_aan_pairs.train.only_ids.tsv").write_text("other")
    data_dir = folder / "data"
    data_dir.mkdir()
    with tarfile.open(data_dir / "lra_release.gz", "w:gz") as tar:
        tar.add(folder / "staging", "lra_release/lra_release")
    task = Retrieval(**SIZES, max_bytes=20, data_dir=str(data_dir))
    assert "lra_release.gz" in task.cost()
    task.prepare()
    return task


@pytest.mark.parametrize("write", [write_plain, write_quoted])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_of_a_file_give_each_row_once(tmp_path, write, parts):
    path = tmp_path / "pairs.tsv"
    write(path, rows("train"))
    found = [pair for part in range(parts) for pair in read_pairs(path, part, parts)]
    assert found == as_bytes(rows("train"))


def test_part_that_begins_with_a_row(tmp_path):
    path = tmp_path / "pairs.tsv"
    write_plain(path, [(1, "a", "b")] * 6)
    assert [len(list(read_pairs(path, part, 3))) for part in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(
    "bad",
    [
        b"1.0\tP\tQ\tonly one text\n",
        b"2.0\tP\tQ\ta\tb\n",
        b'"1.0"\t"P"\t"Q"\t"a"\t"cut sh',
        b"\n",
        b"label\tid1\tid2\ttext1\ttext2\n",
    ],
)
def test_bad_row_is_placed(tmp_path, bad):
    path = tmp_path / "pairs.tsv"
    good = b"1.0\tP\tQ\ta\tb\n"
    path.write_bytes(good + bad)
    with pytest.raises(TaskError, match=rf"pairs.tsv, byte {len(good)}: expected a row"):
        list(read_pairs(path))


def test_examples_are_pairs_of_byte_sequences(prepared):
    assert str(prepared.directory) in prepared.cost()
    for split in SPLITS:
        cut = [(label, text1[:20], text2[:20]) for label, text1, text2 in as_bytes(rows(split))]
        assert decoded(prepared, split) == cut
        example = prepared.source(split)[0]
        assert example["inputs"].shape == example["mask"].shape == (2, 20)
        assert (example["inputs"].dtype, example["targets"].dtype) == (np.int32, np.int32)
        np.testing.assert_array_equal(example["inputs"] != 0, example["mask"])
        assert example["weights"] == 1


def test_fewer_examples_are_a_fixed_subset(prepared):
    fewer = Retrieval(num_examples=4, num_valid=4, num_test=1, max_bytes=20, data_dir=prepared.data_dir)
    fewer.prepare()
    chosen = decoded(fewer, "train")
    assert len(chosen) == len(set(chosen)) == 4
    assert set(chosen) < set(decoded(prepared, "train"))
    assert chosen == decoded(fewer, "train")
    assert decoded(fewer, "valid") == decoded(prepared, "valid")
    assert fewer.name != prepared.name


def test_published_sizes_are_the_default(prepared):
    task = Retrieval(max_bytes=20, data_dir=prepared.data_dir)
    assert task.sizes == {"train": 147_086, "valid": 18_090, "test": 17_437}
    with pytest.raises(TaskError, match=r"9 train examples.*config\.task\.num_examples=9 or less"):
        task.prepare()
    assert (Retrieval().length, task.vocab_size, task.num_outputs, task.head) == (4000, 257, 2, "match")


@pytest.mark.parametrize("folder", ["lra_release/tsv_data", "lra_release/lra_release/tsv_data", "tsv_data", "aan"])
def test_unpacked_release_is_found(tmp_path, folder):
    write_release(tmp_path / folder)
    assert str(tmp_path / folder) in Retrieval(data_dir=str(tmp_path)).cost()


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "URL", "http://127.0.0.1:1/lra_release.gz")
    task = Retrieval(data_dir=str(tmp_path))
    assert "7.7 GB" in task.cost()
    with pytest.raises(TaskError) as raised:
        task.prepare()
    for part in (
        retrieval.URL,
        str(tmp_path / "lra_release.gz"),
        str(tmp_path / "lra_release/tsv_data"),
        "new_aan_pairs.train.tsv",
    ):
        assert part in str(raised.value)


def test_damaged_release_gives_no_data(tmp_path):
    (tmp_path / "lra_release.gz").write_bytes(b"403 Forbidden")
    with pytest.raises(TaskError, match="not a sound tar archive"):
        Retrieval(data_dir=str(tmp_path)).prepare()
    assert not (tmp_path / "lra_release").exists()


def test_nonsense_arguments():
    with pytest.raises(TaskError, match="at least 1"):
        Retrieval(max_bytes=0)
