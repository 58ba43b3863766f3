"""Image: the binary format is read right, grey and colour are what they should be, and bad files are refused."""

import hashlib
import tarfile

import numpy as np
import pytest

from efficient_attn.tasks import image
from efficient_attn.tasks.base import SPLITS, TaskError
from efficient_attn.tasks.image import TEST_FILES, TRAIN_FILES, Image, to_grey

SIZES = {"num_examples": 12, "num_valid": 3, "num_test": 3}
FOLDER = "cifar-10-batches-bin"


def pixels(number):
    """Image `number` of the set, [3, 32, 32]."""
    return np.random.default_rng(number).integers(0, 256, (3, 32, 32), dtype=np.uint8)


def write_files(folder):
    """Five files of three training images, numbers 0..14, and one of three test images, 15..17; the label is number mod 10."""
    folder.mkdir(parents=True)
    for file, name in enumerate((*TRAIN_FILES, *TEST_FILES)):
        numbers = range(3 * file, 3 * file + 3)
        (folder / name).write_bytes(b"".join(bytes([number % 10]) + pixels(number).tobytes() for number in numbers))


@pytest.fixture
def data_dir(tmp_path):
    write_files(tmp_path / FOLDER)
    return tmp_path


def test_splits_are_the_official_ones_in_order(data_dir):
    task = Image(**SIZES, data_dir=str(data_dir))
    task.prepare()
    numbers = {"train": range(12), "valid": range(12, 15), "test": range(15, 18)}
    for split in SPLITS:
        source = task.source(split)
        assert len(source) == task.sizes[split] == len(numbers[split])
        for i, number in enumerate(numbers[split]):
            example = source[i]
            np.testing.assert_array_equal(example["inputs"] - 1, to_grey(pixels(number)).ravel())
            assert example["targets"] == number % 10
            assert "mask" not in example
            assert example["weights"] == 1
        with pytest.raises(IndexError):
            source[len(source)]


def test_fewer_examples_keep_the_validation_images(data_dir):
    task = Image(num_examples=4, num_valid=3, num_test=1, data_dir=str(data_dir))
    assert [int(task.source("train")[i]["targets"]) for i in range(4)] == [0, 1, 2, 3]
    assert [int(task.source("valid")[i]["targets"]) for i in range(3)] == [2, 3, 4]
    assert len(task.source("test")) == 1


def test_grey_is_luma():
    picture = pixels(0)
    luma = np.einsum("c,chw->hw", [0.2989, 0.5870, 0.1140], picture.astype(np.float64))
    np.testing.assert_array_equal(to_grey(picture), np.floor(luma * 255.5 / 255))
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    np.testing.assert_array_equal(to_grey(levels)[0], np.arange(256))


def test_real_values_are_normalised(data_dir):
    grey = Image(**SIZES, as_tokens=False, data_dir=str(data_dir))
    colour = Image(**SIZES, as_tokens=False, colour=True, data_dir=str(data_dir))
    assert (grey.channels, grey.vocab_size, colour.channels, colour.vocab_size) == (1, None, 3, None)
    inputs = grey.source("train")[1]["inputs"]
    assert (inputs.shape, inputs.dtype) == ((1024, 1), np.float32)
    np.testing.assert_allclose(inputs[:, 0] * 61.0 + 122.6, to_grey(pixels(1)).ravel(), atol=1e-3)
    inputs = colour.source("train")[1]["inputs"]
    assert (inputs.shape, inputs.dtype) == ((1024, 3), np.float32)
    restored = (inputs * image.RGB_STD + image.RGB_MEAN) * 255
    np.testing.assert_allclose(restored[33], pixels(1)[:, 1, 1], atol=1e-3)  # position 33 is row 1, column 1
    assert len({Image(**SIZES).name, grey.name, colour.name}) == 3


def test_published_sizes_are_the_default():
    task = Image()
    assert task.sizes == {"train": 45_000, "valid": 5_000, "test": 10_000}
    assert (task.length, task.vocab_size, task.channels, task.num_outputs) == (1024, 257, 0, 10)


def test_fetches_verifies_and_unpacks_the_archive(tmp_path, monkeypatch):
    published = tmp_path / "published"
    write_files(published / FOLDER)
    with tarfile.open(published / "cifar.tar.gz", "w:gz") as tar:
        tar.add(published / FOLDER, FOLDER)
    monkeypatch.setattr(image, "URL", (published / "cifar.tar.gz").as_uri())
    monkeypatch.setattr(image, "SHA256", hashlib.sha256((published / "cifar.tar.gz").read_bytes()).hexdigest())
    task = Image(**SIZES, data_dir=str(tmp_path / "data"))
    task.directory.mkdir(parents=True)
    (task.directory / "data_batch_2.bin.part").write_bytes(b"left by an interrupted run")
    with pytest.raises(TaskError, match=r"lacks data_batch_1.bin"):
        task.source("train")
    assert image.URL in task.cost()
    task.prepare()
    assert str(task.directory) in task.cost()
    files = {path.name: path.read_bytes() for path in task.directory.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (published / FOLDER).iterdir()}


def test_no_data_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "URL", "http://127.0.0.1:1/cifar-10-binary.tar.gz")
    with pytest.raises(TaskError) as raised:
        Image(data_dir=str(tmp_path)).prepare()
    assert image.URL in str(raised.value)
    assert str(tmp_path / "cifar-10-binary.tar.gz") in str(raised.value)


def test_truncated_file(data_dir):
    path = data_dir / FOLDER / TRAIN_FILES[3]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TaskError, match=r"data_batch_4.bin has 9,218 bytes"):
        Image(**SIZES, data_dir=str(data_dir)).prepare()


def test_file_that_lacks_records_names_the_field(data_dir):
    path = data_dir / FOLDER / TRAIN_FILES[3]
    path.write_bytes(path.read_bytes()[:3073])
    with pytest.raises(TaskError, match=r"10 train examples.*num_examples=10 or less"):
        Image(**SIZES, data_dir=str(data_dir)).prepare()


def test_impossible_label(data_dir):
    path = data_dir / FOLDER / TEST_FILES[0]
    path.write_bytes(bytes([17]) + path.read_bytes()[1:])
    with pytest.raises(TaskError, match=r"test_batch.bin holds the label 17"):
        Image(**SIZES, data_dir=str(data_dir)).prepare()


@pytest.mark.parametrize("arguments", [{"colour": True}, {"num_test": 0}])
def test_nonsense_arguments(arguments):
    with pytest.raises(TaskError, match=r"as_tokens=False|at least 1"):
        Image(**arguments)
