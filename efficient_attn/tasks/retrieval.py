"""Retrieval: does one paper cite the other? Pairs of papers of the ACL Anthology Network, read as bytes (Long Range Arena)."""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from efficient_attn.tasks import download, records
from efficient_attn.tasks.base import SPLITS, Example, Head, MapSource, Source, Split, Task, TaskError, sequence_example

URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
TSV_FILES: Mapping[Split, str] = {
    "train": "new_aan_pairs.train.tsv",
    "valid": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
_TSV_FOLDERS = ("lra_release/tsv_data", "lra_release/lra_release/tsv_data", "tsv_data", "aan")
_SHARD_BYTES = 64 << 20  # of a TSV file
_LONGEST_FIELD = 1 << 30
_LABELS = {b"0.0": 0, b"1.0": 1}
_TEXT = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
_FEATURES = {"text1": _TEXT, "text2": _TEXT, "label": tfds.features.Scalar(np.int32)}


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """Whether two papers are linked by a citation, from the first `max_bytes` bytes of each; token = byte + 1, 0 is padding.

    The pairs and the splits are those of the LRA release (147,086 / 18,090 / 17,437). Papers recur in several pairs, also
    across splits; that is the release's protocol.

    Source, the first that there is: the release's three `new_aan_pairs.{train,eval,test}.tsv` in `data_dir`, in
    one of `lra_release/tsv_data`, `lra_release/lra_release/tsv_data`, `tsv_data`, `aan`; the release as
    `data_dir/lra_release.gz`; a download of it (7.7 GB). What is read is written once as records cut to `max_bytes`,
    in `directory`, and the TSV files are not needed after that.

    Fields:
      max_bytes: L, of each of the two papers; 4,000 in LRA.
      num_examples, num_valid, num_test: pairs in each split; fewer than there are give a random subset, always the same.
      data_dir: folder of all data.
    """

    max_bytes: int = 4000
    num_examples: int = 147_086
    num_valid: int = 18_090
    num_test: int = 17_437
    data_dir: str = "data"

    head: ClassVar[Head] = "match"

    def __post_init__(self):
        if min(self.max_bytes, self.num_examples, self.num_valid, self.num_test) < 1:
            raise TaskError(f"max_bytes, num_examples, num_valid and num_test must be at least 1; got {self}.")

    @property
    def name(self) -> str:
        return f"retrieval-{self.max_bytes}-{self.num_examples}-{self.num_valid}-{self.num_test}"

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
        """Folder of the prepared records: all pairs, whatever the sizes asked for."""
        return pathlib.Path(self.data_dir) / f"retrieval_bytes{self.max_bytes}"

    @property
    def archive(self) -> pathlib.Path:
        return pathlib.Path(self.data_dir) / "lra_release.gz"

    def cost(self) -> str:
        if records.is_prepared(self.directory):
            return f"AAN pairs, prepared in {self.directory}"
        most = 2 * self.max_bytes * sum(self.sizes.values()) / 1e9
        work = f"writing them to {self.directory} takes up to {most:.2f} GB and, for the whole release, a few minutes"
        if (folder := self._tsv_folder()) is not None:
            return f"AAN pairs in {folder}; {work}"
        if self.archive.exists():
            return f"AAN pairs to unpack from {self.archive}; {work}"
        return f"AAN pairs: 7.7 GB to download from {URL} to {self.archive}; {work}"

    def prepare(self) -> None:
        if not records.is_prepared(self.directory):
            files = self._tsv_files()
            shards = {split: -(-path.stat().st_size // _SHARD_BYTES) for split, path in files.items()}
            records.prepare(
                self.directory,
                features=tfds.features.FeaturesDict(_FEATURES),
                shards=shards,
                generate=functools.partial(_generate, files, shards, self.max_bytes),
            )
        for split in SPLITS:
            self.source(split)

    def source(self, split: Split) -> Source:
        """Raises `TaskError` if the split is not prepared or smaller than the fields say."""
        pairs = records.open_split(self.directory, split)
        download.check_size(split, self.sizes[split], len(pairs), self.directory)
        chosen = np.random.default_rng(0).permutation(len(pairs))[: self.sizes[split]]
        return MapSource(np.sort(chosen).tolist(), functools.partial(_example, pairs, self.max_bytes))

    def _tsv_folder(self) -> pathlib.Path | None:
        folders = (pathlib.Path(self.data_dir) / folder for folder in _TSV_FOLDERS)
        return next((folder for folder in folders if all((folder / name).exists() for name in TSV_FILES.values())), None)

    def _tsv_files(self) -> dict[Split, pathlib.Path]:
        """The three TSV files, after fetching and unpacking the release if they are nowhere."""
        folder = self._tsv_folder()
        if folder is None:
            folder = pathlib.Path(self.data_dir) / _TSV_FOLDERS[0]
            note = f"The server has at times refused this file (403); the three {TSV_FILES['train']} etc. in {folder} are enough."
            archive = download.fetch(URL, self.archive, note=note)
            download.extract(archive, {f"tsv_data/{name}": folder / name for name in TSV_FILES.values()})
        return {split: folder / name for split, name in TSV_FILES.items()}


def _example(pairs: Source, max_bytes: int, index: int) -> Example:
    pair = pairs[index]
    papers = [
        sequence_example(pair[key][:max_bytes].astype(np.int32) + 1, int(pair["label"]), max_bytes) for key in ("text1", "text2")
    ]
    stacked = {key: np.stack([paper[key] for paper in papers]) for key in ("inputs", "mask")}
    return {**papers[0], **stacked}


def _generate(
    files: Mapping[Split, pathlib.Path], shards: Mapping[Split, int], max_bytes: int, split: Split, shard: int
) -> Iterator[dict]:
    for label, text1, text2 in read_pairs(files[split], shard, shards[split]):
        texts = {"text1": text1, "text2": text2}
        yield {"label": label, **{key: np.frombuffer(text[:max_bytes], np.uint8) for key, text in texts.items()}}


def read_pairs(path: pathlib.Path, part: int = 0, parts: int = 1) -> Iterator[tuple[int, bytes, bytes]]:
    """Label and two texts of each row of a TSV file that begins in the `part`-th of `parts` equal stretches of bytes.

    A row is one line of five fields separated by tabs: label (0.0 or 1.0), two paper identifiers, two texts. The release
    does not quote its fields; files whose rows begin with a quotation mark are read as quoted in the manner of CSV.

    Raises `TaskError`, naming the row's place, if a row is anything else.
    """
    size = path.stat().st_size
    start, stop = part * size // parts, (part + 1) * size // parts
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a row that began before
        while (place := file.tell()) < stop:
            try:
                label, _, _, text1, text2 = _fields(file.readline())
                pair = _LABELS[label], text1, text2
            except (ValueError, KeyError, csv.Error) as error:
                raise TaskError(
                    f"{path}, byte {place:,}: expected a row 'label, id1, id2, text1, text2' separated by tabs with the label "
                    f"0.0 or 1.0 ({error}). If the file is cut short or not from the LRA release, replace it."
                ) from error
            yield pair


def _fields(row: bytes) -> list[bytes]:
    if not row.startswith(b'"'):
        return row.rstrip(b"\r\n").split(b"\t")
    csv.field_size_limit(_LONGEST_FIELD)
    (fields,) = csv.reader([row.decode("latin-1")], delimiter="\t", strict=True)  # latin-1 keeps every byte
    return [field.encode("latin-1") for field in fields]
