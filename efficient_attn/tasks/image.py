"""Image: CIFAR-10 classified from its pixels in raster order (Long Range Arena; data of Krizhevsky 2009)."""

import bisect
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from efficient_attn.tasks import download
from efficient_attn.tasks.base import SPLITS, Example, Head, MapSource, Source, Split, Task, TaskError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # as registered in TFDS; 170,052,171 bytes
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the red, green and blue planes

# Mean and standard deviation over the pixels of the training set, on the scale 0..1, as S4 and S5 use them.
GREY_MEAN, GREY_STD = 122.6 / 255, 61.0 / 255
RGB_MEAN, RGB_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)


@dataclasses.dataclass(frozen=True)
class Image(Task):
    """One of ten classes from the 1,024 pixels of a grey image, row by row.

    With `as_tokens` (Long Range Arena) a pixel is the token intensity + 1, and 0, padding, does not occur. Without, it is
    a real number, normalised (S4, S5). With `colour` as well, it is the three normalised channels ("sCIFAR" of the LRU
    paper, another task with higher accuracies). Grey is what TensorFlow's `rgb_to_grayscale` makes of it, as in LRA, for
    both; S4 and S5 used Pillow's, which differs by one level at most.

    Splits: 45,000 / 5,000 / 10,000. Valid is the last tenth of the training images in the order of the archive. LRA takes
    the last tenth in TFDS's order and S4 a random tenth, so the images differ, not their distribution: the archive's order
    is random.

    Source, the first that there is: `data_dir/cifar-10-batches-bin/` (the official binary files, read in place: they are
    fixed-size records already), `data_dir/cifar-10-binary.tar.gz`, a download of that archive.

    Fields:
      as_tokens: integer tokens or real values.
      colour: three channels in place of grey; needs `as_tokens=False`.
      num_examples: training images; fewer than 45,000 are the first of them.
      num_valid: images held out from the end of the training set.
      num_test: test images; fewer than 10,000 are the first of them, whose accuracy is not comparable with published ones.
      data_dir: folder of all data.
    """

    as_tokens: bool = True
    colour: bool = False
    num_examples: int = 45_000
    num_valid: int = 5_000
    num_test: int = 10_000
    data_dir: str = "data"

    head: ClassVar[Head] = "classify"
    padded: ClassVar[bool] = False

    def __post_init__(self):
        if self.colour and self.as_tokens:
            raise TaskError("colour=True gives real-valued channels: set as_tokens=False with it.")
        if min(self.num_examples, self.num_valid, self.num_test) < 1:
            raise TaskError(f"num_examples, num_valid and num_test must be at least 1; got {self}.")

    @property
    def name(self) -> str:
        kind = "colour" if self.colour else "tokens" if self.as_tokens else "grey"
        return f"image-{kind}-{self.num_examples}-{self.num_valid}-{self.num_test}"

    @property
    def length(self) -> int:
        return 1024

    @property
    def num_outputs(self) -> int:
        return 10

    @property
    def vocab_size(self) -> int | None:
        return 257 if self.as_tokens else None

    @property
    def channels(self) -> int:
        return 0 if self.as_tokens else 3 if self.colour else 1

    @property
    def sizes(self) -> Mapping[Split, int]:
        return {"train": self.num_examples, "valid": self.num_valid, "test": self.num_test}

    @property
    def floors(self) -> Mapping[str, float]:
        return {"majority": 0.1}

    @property
    def directory(self) -> pathlib.Path:
        """Folder of the official binary files."""
        return pathlib.Path(self.data_dir) / "cifar-10-batches-bin"

    @property
    def archive(self) -> pathlib.Path:
        return pathlib.Path(self.data_dir) / "cifar-10-binary.tar.gz"

    def cost(self) -> str:
        if not self._missing():
            return f"CIFAR-10, read from {self.directory}"
        unpack = f"unpacking into {self.directory} takes a few seconds and 184 MB"
        if self.archive.exists():
            return f"CIFAR-10 in {self.archive}; {unpack}"
        return f"CIFAR-10: 170 MB to download from {URL} to {self.archive}; {unpack}"

    def prepare(self) -> None:
        if missing := self._missing():
            archive = download.fetch(URL, self.archive, sha256=SHA256)
            download.extract(archive, {f"{self.directory.name}/{name}": self.directory / name for name in missing})
        for split in SPLITS:
            self.source(split)

    def source(self, split: Split) -> Source:
        """Raises `TaskError` if a file is missing or damaged, or the split smaller than the fields say."""
        if missing := self._missing():
            raise TaskError(f"{self.directory} lacks {', '.join(missing)}: call the task's prepare() first (train.py does).")
        images = BinaryFiles([self.directory / name for name in (TEST_FILES if split == "test" else TRAIN_FILES)])
        held_out = 0 if split == "test" else self.num_valid
        available = {"train": len(images) - held_out, "valid": len(images), "test": len(images)}[split]
        download.check_size(split, self.sizes[split], available, self.directory)
        first = len(images) - held_out if split == "valid" else 0
        encode = functools.partial(_example, images, self.as_tokens, self.colour)
        return MapSource(range(first, first + self.sizes[split]), encode)

    def _missing(self) -> list[str]:
        return [name for name in (*TRAIN_FILES, *TEST_FILES) if not (self.directory / name).exists()]


class BinaryFiles:
    """The images of some files of the official binary format, in order: item i is (image [3, 32, 32], label)."""

    def __init__(self, paths: list[pathlib.Path]):
        self.files = [_open_records(path) for path in paths]
        self.ends = list(itertools.accumulate(len(records) for records in self.files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "3 32 32"], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self.ends, index)
        record = self.files[number][index - self.ends[number]]  # counted from the end of its file
        return record[1:].reshape(3, 32, 32), int(record[0])


def _open_records(path: pathlib.Path) -> UInt8[np.ndarray, "records bytes"]:
    size = path.stat().st_size
    if size == 0 or size % _RECORD:
        raise TaskError(f"{path} has {size:,} bytes, no multiple of CIFAR-10's {_RECORD}: damaged, or another set. Delete it.")
    records = np.memmap(path, np.uint8, "r").reshape(-1, _RECORD)
    if (label := int(records[:, 0].max())) >= len(LABELS):
        raise TaskError(f"{path} holds the label {label}, and CIFAR-10 has 0 to 9: damaged, or another set. Delete it.")
    return records


def to_grey(image: UInt8[np.ndarray, "3 height width"]) -> UInt8[np.ndarray, "height width"]:
    """ITU-R BT.601 luma of an RGB image, with the rounding of TensorFlow's `image.rgb_to_grayscale`."""
    weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
    luma = np.tensordot(weights, image.astype(np.float32) * np.float32(1 / 255), axes=1)
    return (luma * np.float32(255.5)).astype(np.uint8)


def _normalised(image: UInt8[np.ndarray, "3 32 32"], colour: bool) -> Float32[np.ndarray, "1024 channels"]:
    planes = image if colour else to_grey(image)[None]
    mean, std = (RGB_MEAN, RGB_STD) if colour else (GREY_MEAN, GREY_STD)
    return ((planes.reshape(-1, 1024).T / 255 - mean) / std).astype(np.float32)


def _tokens(image: UInt8[np.ndarray, "3 32 32"]) -> Int32[np.ndarray, "1024"]:
    return to_grey(image).reshape(-1).astype(np.int32) + 1


def _example(images: BinaryFiles, as_tokens: bool, colour: bool, index: int) -> Example:
    image, label = images[index]
    inputs = _tokens(image) if as_tokens else _normalised(image, colour)
    return {"inputs": inputs, "targets": np.int32(label), "weights": np.float32(1.0)}
