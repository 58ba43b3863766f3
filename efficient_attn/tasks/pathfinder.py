"""Pathfinder: are two discs joined by a dashed contour? Path-32, Path-64, Path-X (128) and Path-256 of Long Range Arena.

The pixels of a grey image, row by row, are the sequence (Tay et al., "Long Range Arena", 2021, section 2.2.5). The images are
generated here (efficient_attn/tasks/snakes.py) or read from the official release.

    python -m efficient_attn.tasks.pathfinder --resolution=32               make the published amount
    python -m efficient_attn.tasks.pathfinder --resolution=256 --floor=5000  what the distance between the discs gives away
"""

import argparse
import dataclasses
import functools
import io
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32, UInt8

from efficient_attn.tasks import records, snakes
from efficient_attn.tasks.base import SPLITS, Example, Head, MapSource, Source, Split, Task, TaskError

IMAGES_PER_SHARD = 500
PUBLISHED_LENGTHS = {14: "curv_contour_length_14", 9: "curv_contour_length_9", 6: "curv_baseline"}
EMPTY = "pathfinder32/curv_baseline/imgs/0/sample_172.png"  # an empty file in the official release


def generated(
    resolution: int, contour_length: int, seed: int, sizes: Mapping[Split, int], split: Split, shard: int
) -> Iterator[dict]:
    """The images of one shard. Each has a random stream of its own, keyed by all arguments but `sizes`, and by its number.

    The key is hashed to 128 bits (NumPy's SeedSequence; all its words fit in 32 bits and their number is fixed, so that
    different keys are different inputs). The probability that any two of 200,000 images, of the same or of different splits,
    share a stream is therefore below 200,000^2 / 2^129 < 1e-28. That two different streams draw the same image is as improbable
    as in the published data: a layout takes more than 30 random choices among several outcomes each.
    """
    for number in range(*_rows(sizes[split], shard)):
        key = [seed, resolution, contour_length, SPLITS.index(split), shard, number % IMAGES_PER_SHARD]
        image, label = snakes.generate_image(resolution, contour_length, np.random.default_rng(key))
        yield {"image": image.reshape(-1), "label": label}


def _rows(size: int, shard: int) -> tuple[int, int]:
    """The range of a split's examples that one of its shards holds."""
    return shard * IMAGES_PER_SHARD, min(size, (shard + 1) * IMAGES_PER_SHARD)


@functools.lru_cache(maxsize=1)
def release_rows(folder: pathlib.Path) -> tuple[tuple[str, int], ...]:
    """Path below `folder` and label of every image of one difficulty of the release, in the order of its metadata.

    The metadata files, `metadata/<n>.npy`, have a line per image: folder, file, number, label (column 3) and parameters. In
    the release they are plain text in spite of their name; NumPy arrays of strings, which the original generator writes, are
    read too. The release's one empty file is left out.
    """
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if not files:
        raise TaskError(
            f"No metadata in {folder}: expected {folder / 'metadata' / '0.npy'} and so on, and images such as "
            f"{folder / 'imgs' / '0' / 'sample_0.png'}. Unpack lra_release.gz of Long Range Arena and set release_dir to the "
            "folder that holds pathfinder32, ..., pathfinder256."
        )
    rows = []
    for file in files:
        for line, fields in enumerate(_fields(file.read_bytes()), 1):
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise TaskError(f"{file}, line {line}, is {str(fields)[:200]}: expected folder, file, number, label (0, 1), ...")
            path = f"{fields[0]}/{fields[1]}"
            if f"{folder.parent.name}/{folder.name}/{path}" != EMPTY:
                rows.append((path, int(fields[3])))
    return tuple(rows)


def _fields(metadata: bytes) -> list[list[str]]:
    if metadata.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(metadata), allow_pickle=False).tolist()
    return [line.split() for line in metadata.decode(errors="replace").splitlines()]


def release_split(folder: pathlib.Path, seed: int, sizes: Mapping[Split, int]) -> dict[Split, list[tuple[str, int]]]:
    """Rows of each split: all are shuffled by `seed` and cut into 80 / 10 / 10 %, of which the first `sizes` are taken."""
    rows = release_rows(folder)
    order, tenth = np.random.default_rng(seed).permutation(len(rows)), len(rows) // 10
    parts = dict(zip(SPLITS, np.split(order, [len(rows) - 2 * tenth, len(rows) - tenth])))
    if any(len(parts[split]) < sizes[split] for split in SPLITS):
        raise TaskError(
            f"{folder} lists {len(rows):,} images, {[len(parts[split]) for split in SPLITS]} for train, valid and test, but "
            f"num_examples={sizes['train']} needs {[sizes[split] for split in SPLITS]}: set num_examples to at most "
            f"{min(len(parts['train']), 8 * tenth + 7)}."
        )
    return {split: [rows[i] for i in parts[split][: sizes[split]]] for split in SPLITS}


def released(
    folder: pathlib.Path, resolution: int, seed: int, sizes: Mapping[Split, int], split: Split, shard: int
) -> Iterator[dict]:
    """The images of one shard, from the official PNG files."""
    for path, label in release_split(folder, seed, sizes)[split][slice(*_rows(sizes[split], shard))]:
        yield {"image": read_png(folder / path, resolution).reshape(-1), "label": label}


def read_png(path: pathlib.Path, side: int) -> UInt8[np.ndarray, "H H"]:
    """A grey image. Raises `TaskError` with its name if it is missing, damaged, or of another size."""
    try:
        with PIL.Image.open(path) as image:
            if image.size != (side, side):  # before it is decoded: a damaged header may ask for any amount of memory
                raise TaskError(f"{path} has {image.size[0]} x {image.size[1]} pixels; expected {side} x {side}")
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:  # what Pillow raises for bad files
        raise TaskError(f"{path} cannot be read ({error}): unpack it again from the release") from error
    return pixels


def disc_distance_floor(resolution: int, contour_length: int, scenes: int) -> float:
    """Accuracy of the best rule that looks at the distance between the discs alone, cut into 30 intervals.

    Fitted on the first half of the layouts, measured on the second. A layout gives four pairs of discs, two of each class.
    """
    streams = np.random.default_rng(resolution).spawn(scenes // 2 * 2)
    layouts = [snakes.sample_scene(snakes.SPECS[resolution], contour_length, rng).targets for rng in streams]
    apart = np.array([[[math.dist(a.paddles[0][1], b.paddles[-1][1]) for b in pair] for a in pair] for pair in layouts])
    edges = np.quantile(apart[: scenes // 2], np.linspace(0, 1, 31)[1:-1])
    interval = np.digitize(apart, edges)
    joined, apart = (interval[:, [0, 1], ends].reshape(2, -1) for ends in ([0, 1], [1, 0]))  # [fitted or tested, pairs]
    says_joined = np.bincount(joined[0], minlength=30) > np.bincount(apart[0], minlength=30)
    return float((says_joined[joined[1]].mean() + 1 - says_joined[apart[1]].mean()) / 2)


# Images/s of one core: `python -m efficient_attn.tasks.snakes --resolution=R --contour_length=C --benchmark=200` on a shared
# two-core virtual machine whose figures vary by a factor of two. What takes long are targets that get stuck and are begun anew.
RATES = {
    14: {32: 110.0, 64: 4.5, 128: 9.0, 256: 110.0},
    9: {32: 220.0, 64: 48.0, 128: 120.0, 256: 95.0},
    6: {32: 360.0, 64: 390.0, 128: 180.0, 256: 90.0},
}
BYTES = {32: 690, 64: 1600, 128: 2700, 256: 3100}  # of one example on disk, as measured on data sets of 500 and 2,500
# `disc_distance_floor` at contour length 14: this module's --floor=8000 (1500 for 128, 1000 for 64). Standard errors are 0.004
# for 32 and 256, and 0.01 for the others.
DISC_DISTANCE = {32: 0.536, 64: 0.555, 128: 0.548, 256: 0.624}


@dataclasses.dataclass(frozen=True)
class Pathfinder(Task):
    """Two classes: whether two discs are the ends of one contour (1) or of two (0).

    Published: 160,000 / 20,000 / 20,000 images of contour length 14 ("hard"); L is 1,024 for Path-32, 16,384 for Path-X, 65,536
    for Path-256. Images of different splits are drawn independently (see `generated`). Mean, spread and number of lit pixels
    say nothing of the class, but the distance between the discs does say something (`floors`).

    Attributes:
      resolution: side of the image in pixels, 32, 64, 128 or 256; L is its square.
      contour_length: paddles of a target contour, 14 (hard), 9 (intermediate) or 6 (easy).
      num_examples: images of train; valid and test have num_examples // 8 each. A smaller data set is a part of a larger one.
      as_tokens: False gives real inputs in [-1, 1], (x / 255 - 0.5) / 0.5 as S4 and S5 have them; True the tokens intensity + 1
        (Long Range Arena's intensities, moved up because token 0 is padding). The data on disk are the same.
      seed: chooses the images; with `release_dir`, the split.
      data_dir: folder that holds the data set's folder.
      release_dir: folder of the official release that holds `pathfinder32`, ...; if given, its images are the data. They are
        shuffled and cut 80 / 10 / 10 %, as S4 does (with another shuffle); the release itself has no split.
    """

    resolution: int = 32
    contour_length: int = 14
    num_examples: int = 160_000
    as_tokens: bool = False
    seed: int = 0
    data_dir: str = "data"
    release_dir: str = ""

    head: ClassVar[Head] = "classify"
    padded: ClassVar[bool] = False

    def __post_init__(self):
        if self.resolution not in snakes.SPECS:
            raise TaskError(f"Pathfinder resolution={self.resolution}: expected one of {list(snakes.SPECS)}")
        if self.contour_length not in PUBLISHED_LENGTHS:
            raise TaskError(f"Pathfinder contour_length={self.contour_length}: expected one of {list(PUBLISHED_LENGTHS)}")
        if self.num_examples < 8:
            raise TaskError(f"Pathfinder num_examples={self.num_examples}: expected at least 8, as valid and test have an eighth")
        if not 0 <= self.seed < 2**32:
            raise TaskError(f"Pathfinder seed={self.seed}: expected 0 <= seed < 2^32")

    @property
    def name(self) -> str:
        origin = "-release" if self.release_dir else ""
        return f"pathfinder{self.resolution}-cl{self.contour_length}-n{self.num_examples}-s{self.seed}{origin}"

    @property
    def length(self) -> int:
        return self.resolution**2

    @property
    def num_outputs(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int | None:
        return 257 if self.as_tokens else None

    @property
    def channels(self) -> int:
        return 0 if self.as_tokens else 1

    @property
    def sizes(self) -> Mapping[Split, int]:
        held_out = self.num_examples // 8
        return {"train": self.num_examples, "valid": held_out, "test": held_out}

    @property
    def floors(self) -> Mapping[str, float]:
        """Chance, and for contour length 14 what the distance between the discs gives away."""
        measured = {"disc_distance": DISC_DISTANCE[self.resolution]} if self.contour_length == 14 else {}
        return {"chance": 0.5, **measured}

    @property
    def directory(self) -> pathlib.Path:
        """Folder of the prepared data."""
        return pathlib.Path(self.data_dir) / self.name

    @property
    def release_folder(self) -> pathlib.Path:
        """Folder of this resolution and difficulty in the official release."""
        return pathlib.Path(self.release_dir) / f"pathfinder{self.resolution}" / PUBLISHED_LENGTHS[self.contour_length]

    def cost(self) -> str:
        if records.is_prepared(self.directory):
            return f"{self.directory}: already there"
        count, cores = sum(self.sizes.values()), records.num_cores()
        megabytes = f"{count * BYTES[self.resolution] / 1e6:,.0f} MB"
        if self.release_dir:
            return f"{self.directory}: {count:,} images to be read from {self.release_folder}, about {megabytes}"
        seconds = count / RATES[self.contour_length][self.resolution] / cores
        return f"{self.directory}: {count:,} images to be generated, about {seconds:,.0f} s on {cores} cores and {megabytes}"

    def prepare(self) -> None:
        if records.is_prepared(self.directory):
            return
        if self.release_dir:
            release_split(self.release_folder, self.seed, self.sizes)  # says at once what is missing
            generate = functools.partial(released, self.release_folder, self.resolution, self.seed, self.sizes)
        else:
            generate = functools.partial(generated, self.resolution, self.contour_length, self.seed, self.sizes)
        image = tfds.features.Tensor(shape=(self.length,), dtype=np.uint8, encoding="bytes")
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.Scalar(np.uint8)})
        shards = {split: math.ceil(size / IMAGES_PER_SHARD) for split, size in self.sizes.items()}
        records.prepare(self.directory, features=features, shards=shards, generate=generate)

    def source(self, split: Split) -> Source:
        encode = _tokens if self.as_tokens else _scaled
        return MapSource(records.open_split(self.directory, split), functools.partial(_example, encode))


def _tokens(image: UInt8[np.ndarray, "L"]) -> Int32[np.ndarray, "L"]:
    return image.astype(np.int32) + 1


def _scaled(image: UInt8[np.ndarray, "L"]) -> Float32[np.ndarray, "L 1"]:
    return (image * np.float32(2 / 255) - np.float32(1))[:, None]


def _example(encode, record: Mapping[str, np.ndarray]) -> Example:
    image = record["image"]
    return {
        "inputs": encode(image),
        "targets": np.int32(record["label"]),
        "weights": np.float32(1.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a Pathfinder data set, or with --floor measures a floor of its accuracy.")
    parser.add_argument("--floor", type=int, metavar="SCENES", help="print disc_distance_floor on this many layouts")
    for field in dataclasses.fields(Pathfinder):
        if field.name != "as_tokens":
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    scenes = arguments.pop("floor")
    try:
        task = Pathfinder(**arguments)
        if scenes is None:
            task.prepare()
    except TaskError as error:
        parser.error(str(error))
    if scenes is not None:
        print(f"{task.resolution}: {disc_distance_floor(task.resolution, task.contour_length, scenes):.4f}")


if __name__ == "__main__":
    from efficient_attn.tasks import pathfinder  # so that workers find its functions under their importable names

    pathfinder.main()
