"""Text: the splits share no text, every source gives the same examples, and missing data are explained."""

import hashlib
import io
import json
import tarfile
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from efficient_attn.tasks import text
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.text import Text, split_reviews

WORDS = ["dull", "fine", "great", "poor", "slow", "warm", "café"]


def reviews(prefix, count):
    """Distinct reviews of growing length, labels alternating."""
    return [(f"{prefix} {i} {WORDS[i % 7]} {'so ' * i}end".encode(), i % 2) for i in range(count)]


TEST = reviews("test", 9)
TRAIN = [*reviews("train", 20), *reviews("train", 4), TEST[3], TEST[3]]  # four repeated, one (twice) also in test
USABLE = 24
SIZES = {"num_examples": 18, "num_valid": 6, "num_test": 9}


def write_archive(path):
    with tarfile.open(path, "w:gz") as tar:
        for split, rows in (("train", TRAIN), ("test", TEST)):
            for i, (review, label) in sorted(enumerate(rows), key=lambda item: zlib.crc32(item[1][0])):
                add(tar, f"aclImdb/{split}/{('neg', 'pos')[label]}/{i}_7.txt", review + b"\n")
        add(tar, "aclImdb/train/unsup/0_0.txt", b"no label")
        add(tar, "aclImdb/train/urls_pos.txt", b"no review")


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class ImdbReviews(tfds.core.GeneratorBasedBuilder):
    """Writes what `tfds.builder("imdb_reviews")` would, of the reviews above."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain_text")]  # noqa: RUF012

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

    def _generate_examples(self, rows):
        for i, (review, label) in enumerate(rows):
            yield i, {"text": review, "label": label}


@pytest.fixture(scope="module")
def from_tfds(tmp_path_factory):
    """A folder with a TFDS data set, and the task prepared from it."""
    folder = tmp_path_factory.mktemp("tfds_source")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    ImdbReviews(data_dir=folder, file_format="array_record").download_and_prepare(download_config=config)
    task = Text(**SIZES, max_bytes=24, data_dir=str(folder))
    assert str(folder / "imdb_reviews") in task.cost()
    task.prepare()
    return task


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The path of an archive that passes for the published one, which is at its URL."""
    path = tmp_path / "published" / "aclImdb_v1.tar.gz"
    path.parent.mkdir()
    write_archive(path)
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(text, "URL", path.as_uri())
    return path


def decoded(task, split):
    """(text, label) of every example, from its tokens."""
    source = task.source(split)
    examples = [source[i] for i in range(len(source))]
    return [((e["inputs"][e["mask"]] - 1).astype(np.uint8).tobytes(), int(e["targets"])) for e in examples]


def test_download_gives_the_same_examples_as_tfds(from_tfds, archive, tmp_path):
    task = Text(**SIZES, max_bytes=24, data_dir=str(tmp_path / "data"))
    assert archive.as_uri() in task.cost()
    task.prepare()
    assert task.archive.read_bytes() == archive.read_bytes()
    assert str(task.directory) in task.cost()
    for split in SPLITS:
        assert decoded(task, split) == decoded(from_tfds, split)
    task.prepare()  # again: everything is there


def test_prepared_splits(from_tfds):
    task = Text(**SIZES, max_bytes=200, data_dir=from_tfds.data_dir)  # the same records, no cut
    splits = {split: decoded(task, split) for split in SPLITS}
    assert {split: len(rows) for split, rows in splits.items()} == task.sizes
    assert sorted(splits["test"]) == sorted(TEST)
    assert sorted(splits["train"] + splits["valid"]) == sorted(TRAIN[:USABLE])


def test_example_is_cut_and_padded(from_tfds):
    source = from_tfds.source("test")
    by_text = dict(TEST)
    for i in range(len(source)):
        example = source[i]
        assert example["inputs"].shape == example["mask"].shape == (24,)
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        found = next(
            review for review in by_text if review[:24] == bytes(example["inputs"][example["mask"]].tolist()).translate(DOWN)
        )
        assert example["mask"].sum() == min(24, len(found))
        assert (example["inputs"] == 0).sum() == 24 - example["mask"].sum()
        assert example["targets"] == by_text[found]
        assert example["weights"] == 1


DOWN = bytes([0, *range(255)])  # token to byte


def test_fewer_examples_are_the_first_of_all(from_tfds):
    fewer = Text(num_examples=5, num_valid=6, num_test=2, max_bytes=24, data_dir=from_tfds.data_dir)
    fewer.prepare()
    assert decoded(fewer, "train") == decoded(from_tfds, "train")[:5]
    assert decoded(fewer, "test") == decoded(from_tfds, "test")[:2]
    assert fewer.name != from_tfds.name


def test_too_many_examples_name_the_field(from_tfds):
    with pytest.raises(TaskError, match=r"18 train examples.*num_examples=18 or less"):
        Text(num_examples=19, num_valid=6, num_test=9, data_dir=from_tfds.data_dir).prepare()


@pytest.mark.parametrize("seed", range(30))
def test_split_reviews_separates_texts(seed):
    splits = split_reviews(TRAIN, TEST, 6, seed)
    texts = {split: {review for review, _ in rows} for split, rows in splits.items()}
    assert not texts["train"] & texts["valid"]
    assert not (texts["train"] | texts["valid"]) & texts["test"]
    assert [len(splits[split]) for split in SPLITS] == [18, 6, 9]
    assert sorted(splits["train"] + splits["valid"]) == sorted(TRAIN[:USABLE])


def test_split_reviews_depends_on_the_seed_and_not_on_the_order():
    splits = split_reviews(TRAIN, TEST, 6, 0)
    assert split_reviews(TRAIN[::-1], TEST[::-1], 6, 0) == splits
    other = split_reviews(TRAIN, TEST, 6, 1)
    assert sorted(other["valid"]) != sorted(splits["valid"])
    assert other["test"] != splits["test"]


def test_held_out_reviews_must_leave_some():
    with pytest.raises(TaskError, match="there are 24 usable reviews"):
        split_reviews(TRAIN, TEST, 100, 0)


def test_published_sizes_are_the_default():
    task = Text()
    assert task.sizes == {"train": 25_000 - 123 - 2_500, "valid": 2_500, "test": 25_000}
    assert (task.length, task.vocab_size, task.num_outputs, task.head) == (4096, 257, 2, "classify")


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "URL", "http://127.0.0.1:1/aclImdb_v1.tar.gz")
    with pytest.raises(TaskError) as raised:
        Text(data_dir=str(tmp_path)).prepare()
    assert text.URL in str(raised.value)
    assert str(tmp_path / "aclImdb_v1.tar.gz") in str(raised.value)


def test_damaged_archive_is_refused(archive, tmp_path):
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(TaskError, match="not the published file"):
        Text(data_dir=str(tmp_path)).prepare()


def test_archive_without_reviews(tmp_path):
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as tar:
        add(tar, "aclImdb/train/pos/0_9.txt", b"fine")
    with pytest.raises(TaskError, match="no aclImdb/train and aclImdb/test"):
        text.read_archive(tmp_path / "other.tar.gz")


def test_tfds_data_in_another_format(from_tfds, tmp_path):
    for path in (text.pathlib.Path(from_tfds.data_dir) / "imdb_reviews/plain_text/1.0.0").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text().replace("array_record", "tfrecord"))
    assert json.loads((tmp_path / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    with pytest.raises(TaskError, match="prepared as tfrecord"):
        text.read_tfds(tmp_path)


def test_nonsense_arguments():
    with pytest.raises(TaskError, match="at least 1"):
        Text(num_valid=0)
