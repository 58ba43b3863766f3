"""Text: the sentiment of IMDb reviews read as bytes (Long Range Arena; data of Maas et al. 2011)."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from efficient_attn.tasks import download, records
from efficient_attn.tasks.base import SPLITS, Example, Head, MapSource, Source, Split, Task, TaskError, sequence_example

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"  # as registered in TFDS; 84,125,825 bytes
_MEMBER = re.compile(r"aclImdb/(?P<split>train|test)/(?P<label>neg|pos)/[^/]+\.txt")
_TFDS_FOLDERS = ("imdb_reviews/plain_text/1.0.0", "tfds/imdb_reviews/plain_text/1.0.0")
_FEATURES = {
    "text": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
    "label": tfds.features.Scalar(np.int32),
}

Review = tuple[bytes, int]  # UTF-8 text and label: 0 negative, 1 positive


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Binary sentiment of a review from its first `max_bytes` bytes; token = byte + 1, and 0 is padding.

    Long Range Arena's configurations cut at 1,000 bytes and its paper reports the best of 1,000 to 4,000; S4 and later
    work use 4,096 (3 % of the reviews are longer).

    Splits. The official set has 25,000 training and 25,000 test reviews and no validation set; LRA validates on test.
    Here `num_valid` reviews are held out of train. 123 official training reviews recur word for word in test and are left
    out; the copies of a text repeated within train all fall on the same side. So no text is in two splits, and 22,377
    of the 25,000 remain to train on. Which reviews are held out depends on `seed` alone, not on where they were read from.

    Source, the first that there is: a data set prepared by TFDS as array_record (`imdb_reviews/plain_text/1.0.0` in
    `data_dir` or in `data_dir/tfds`), `data_dir/aclImdb_v1.tar.gz`, a download of that archive.

    Fields:
      max_bytes: L.
      num_examples: training reviews; fewer than 22,377 are a random subset of them.
      num_valid: reviews held out for validation.
      num_test: test reviews; fewer than 25,000 are a random subset, whose accuracy is not comparable with published ones.
      seed: of the splits.
      data_dir: folder of all data.
    """

    max_bytes: int = 4096
    num_examples: int = 22_377
    num_valid: int = 2_500
    num_test: int = 25_000
    seed: int = 0
    data_dir: str = "data"

    head: ClassVar[Head] = "classify"

    def __post_init__(self):
        if min(self.max_bytes, self.num_examples, self.num_valid, self.num_test) < 1:
            raise TaskError(f"max_bytes, num_examples, num_valid and num_test must be at least 1; got {self}.")

    @property
    def name(self) -> str:
        return f"text-{self.max_bytes}-{self.num_examples}-{self.num_valid}-{self.num_test}-s{self.seed}"

    @property
    def length(self) -> int:
        return self.max_bytes

    @property
    def num_outputs(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int:
        return 257

    @property
    def sizes(self) -> Mapping[Split, int]:
        return {"train": self.num_examples, "valid": self.num_valid, "test": self.num_test}

    @property
    def floors(self) -> Mapping[str, float]:
        return {"majority": 0.5}

    @property
    def directory(self) -> pathlib.Path:
        """Folder of the prepared splits: whole texts, shared by every `max_bytes`, `num_examples` and `num_test`."""
        return pathlib.Path(self.data_dir) / f"imdb_bytes_v{self.num_valid}_s{self.seed}"

    @property
    def archive(self) -> pathlib.Path:
        return pathlib.Path(self.data_dir) / "aclImdb_v1.tar.gz"

    def cost(self) -> str:
        if records.is_prepared(self.directory):
            return f"IMDb reviews, prepared in {self.directory}"
        work = f"splitting them into {self.directory} takes about 10 s and 41 MB"
        for found in (self._tfds_folder(), self.archive):
            if found is not None and found.exists():
                return f"IMDb reviews in {found}; {work}"
        return f"IMDb reviews: 84 MB to download from {URL} to {self.archive}; {work}"

    def prepare(self) -> None:
        if not records.is_prepared(self.directory):
            origin = self._tfds_folder() or download.fetch(URL, self.archive, sha256=SHA256)
            records.prepare(
                self.directory,
                features=tfds.features.FeaturesDict(_FEATURES),
                shards=dict.fromkeys(SPLITS, 1),
                generate=functools.partial(_generate, origin, self.num_valid, self.seed),
                workers=1,  # every split needs all the reviews: they are read once
            )
        for split in SPLITS:
            self.source(split)

    def source(self, split: Split) -> Source:
        """Raises `TaskError` if the split is not prepared or smaller than the fields say."""
        reviews = records.open_split(self.directory, split)
        download.check_size(split, self.sizes[split], len(reviews), self.directory)
        return MapSource(range(self.sizes[split]), functools.partial(_example, reviews, self.max_bytes))

    def _tfds_folder(self) -> pathlib.Path | None:
        folders = (pathlib.Path(self.data_dir) / folder for folder in _TFDS_FOLDERS)
        return next((folder for folder in folders if folder.is_dir()), None)


def _example(reviews: Source, max_bytes: int, index: int) -> Example:
    review = reviews[index]
    return sequence_example(review["text"][:max_bytes].astype(np.int32) + 1, int(review["label"]), max_bytes)


def _generate(origin: pathlib.Path, num_valid: int, seed: int, split: str, shard: int) -> Iterator[dict]:
    del shard  # there is one of each split
    for text, label in _splits(origin, num_valid, seed)[split]:
        yield {"text": np.frombuffer(text, np.uint8), "label": label}


@functools.cache
def _splits(origin: pathlib.Path, num_valid: int, seed: int) -> Mapping[Split, list[Review]]:
    official = read_tfds(origin) if origin.is_dir() else read_archive(origin)
    return split_reviews(official["train"], official["test"], num_valid, seed)


def split_reviews(train: list[Review], test: list[Review], num_valid: int, seed: int) -> dict[Split, list[Review]]:
    """Holds `num_valid` reviews out of `train`, each split in random order; the order of the arguments does not matter.

    Texts that are also in `test` are dropped from `train`, and equal texts are kept together.
    """
    rng = np.random.default_rng(seed)
    tested = {text for text, _ in test}
    copies: dict[bytes, list[Review]] = {}
    for review in sorted(train):
        if review[0] not in tested:
            copies.setdefault(review[0], []).append(review)
    groups = list(copies.values())
    splits: dict[Split, list[Review]] = {"train": [], "valid": [], "test": []}
    for index in rng.permutation(len(groups)):
        fits = len(splits["valid"]) + len(groups[index]) <= num_valid
        splits["valid" if fits else "train"] += groups[index]
    if not splits["train"]:
        raise TaskError(f"num_valid={num_valid} leaves nothing to train on: there are {len(splits['valid'])} usable reviews.")
    ordered = sorted(test)
    splits["test"] = [ordered[index] for index in rng.permutation(len(ordered))]
    return splits


def read_tfds(folder: pathlib.Path) -> dict[str, list[Review]]:
    """The official train and test reviews of a data set prepared by TFDS."""
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise TaskError(
            f"{folder} was prepared as {builder.info.file_format.value}, which cannot be read without TensorFlow. Move it away "
            'to have the archive downloaded, or prepare it with tfds.builder("imdb_reviews", file_format="array_record").'
        )
    official = builder.as_data_source()
    return {split: [(row["text"], int(row["label"])) for row in official[split]] for split in ("train", "test")}


def read_archive(archive: pathlib.Path) -> dict[str, list[Review]]:
    """The official train and test reviews of `aclImdb_v1.tar.gz`, without surrounding white space (as TFDS has them)."""
    official: dict[str, list[Review]] = {"train": [], "test": []}
    with download.open_tar(archive) as tar:
        for member in tar:
            if found := _MEMBER.fullmatch(member.name):
                text = tar.extractfile(member).read().strip()
                official[found["split"]].append((text, int(found["label"] == "pos")))
    if not all(official.values()):
        raise TaskError(f"{archive} holds no aclImdb/train and aclImdb/test reviews; fetch {URL} in its place.")
    return official
