"""Damaged inputs of the tasks: TSV, PNG, binary images, archives, text and records, byte by byte.

Each format has a sound file and its reader; a case damages the file. The reader must give what the sound file holds, give what
an independent reading of the damaged file gives, or refuse with a `TaskError`; where it writes, nothing half-written may stay.
"""

import functools
import io
import pathlib
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from efficient_attn.tasks import image, listops, lm_text, pathfinder, records, retrieval, text
from tests.fuzz.judge import Case, WrongResult

CLEAR = None  # only the project's own errors
SECONDS = 20.0


def damage(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Change some bytes; says how."""
    at = rng.randrange(len(data))
    size = rng.choice((1, 1, 2, 7, 40, len(data)))
    kind = rng.choice(("flip", "cut", "drop", "repeat", "insert", "zero", "crlf", "text", "empty"))
    if kind == "flip":
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    elif kind == "cut":
        data = data[:at]
    elif kind == "drop":
        data = data[:at] + data[at + size :]
    elif kind == "repeat":
        data = data[:at] + data[at : at + size] * 2 + data[at + size :]
    elif kind == "insert":
        data = data[:at] + rng.randbytes(min(size, 50)) + data[at:]
    elif kind == "zero":
        data = data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
    elif kind == "crlf":
        data = data.replace(b"\n", b"\r\n")
    elif kind == "text":
        data = data[:at] + rng.choice(("é", "\t", "\n", '"', "( [MAX", "-1", "9" * 50)).encode() + data[at:]
    else:
        data = b""
    return data, f"{kind} at {at} of {size}"


def require(condition: bool, what: str) -> None:
    if not condition:
        raise WrongResult(what)


# Each format: a function that makes the sound file's bytes, and one that reads a file and checks what it gave.

ROWS = 300


@functools.cache
def listops_tsv() -> bytes:
    words = ["[MIN", "[MAX", "[MED", "[SM"]
    lines = ["Source\tTarget"]
    draw = random.Random(1)
    for _ in range(ROWS):
        digits = [draw.randrange(10) for _ in range(draw.randrange(2, 5))]
        operator = draw.randrange(4)
        value = (min(digits), max(digits), int(np.median(digits)), sum(digits) % 10)[operator]
        nested = "( " * (len(digits) + 1) + words[operator] + "".join(f" {digit} )" for digit in digits) + " ] )"
        lines.append(f"{nested}\t{value}")
    return "".join(line + "\n" for line in lines).encode()


def read_listops(path: pathlib.Path, sound: bool) -> None:
    target = path.rename(path.with_name("basic_val.tsv"))
    sizes = {"train": ROWS, "valid": ROWS, "test": ROWS}
    shards = range(listops.SHARDS["valid"])
    rows = [row for shard in shards for row in listops._released(str(target.parent), sizes, "valid", shard)]
    lines = target.read_bytes().decode().splitlines()[1 : ROWS + 1]
    require(len(rows) == ROWS, f"{len(rows)} rows")
    symbols = [*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
    for row, line in zip(rows, lines, strict=True):
        source, value = line.split("\t")
        words = source.replace("(", " ").replace(")", " ").split()
        require([symbols.index(word) for word in words] == (row["tokens"] - listops.DIGIT).tolist(), f"tokens of {line!r}")
        require(str(row["label"]) == value.strip(), f"label of {line!r}")


@functools.cache
def pairs_tsv() -> bytes:
    draw = random.Random(2)
    return b"".join(
        f"{draw.choice(('0.0', '1.0'))}\tid{i}\tid{i + 1}\tsome text {i} über alles\tother text {i}\n".encode() for i in range(60)
    )


def read_pairs(path: pathlib.Path, sound: bool) -> None:
    got = [pair for part in range(3) for pair in retrieval.read_pairs(path, part, 3)]
    lines = path.read_bytes().split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    require(len(got) == len(lines), f"{len(got)} rows of {len(lines)}")
    for (label, *texts), line in zip(got, lines):
        fields = line.rstrip(b"\r").split(b"\t")
        require(line.startswith(b'"') or ([f"{label}.0".encode(), *texts] == [fields[0], *fields[3:]]), f"row {line[:60]!r}")


@functools.cache
def png() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    PIL.Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    return file.getvalue()


def read_png(path: pathlib.Path, sound: bool) -> None:
    got = pathfinder.read_png(path, 32)
    right = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    require(np.array_equal(got, right), f"{np.sum(got != right)} pixels differ")


@functools.cache
def metadata() -> bytes:
    return b"".join(f"imgs/0 sample_{i}.png {i} {i % 2} 1.8 6 2.0 5 1.5 2 20 1\n".encode() for i in range(40))


def read_metadata(path: pathlib.Path, sound: bool) -> None:
    folder = path.parent / "metadata"
    folder.mkdir()
    path.rename(folder / "0.npy")
    pathfinder.release_rows.cache_clear()
    rows = pathfinder.release_rows(path.parent)
    lines = (folder / "0.npy").read_bytes().decode(errors="replace").splitlines()
    require(rows == tuple((f"{f[0]}/{f[1]}", int(f[3])) for f in (line.split() for line in lines)), "rows")


@functools.cache
def cifar() -> bytes:
    draw = np.random.default_rng(3).integers(0, 256, (6, 3073), np.uint8)
    draw[:, 0] %= 10
    return draw.tobytes()


def read_cifar(path: pathlib.Path, sound: bool) -> None:
    files = image.BinaryFiles([path])
    table = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073)
    require(len(files) == len(table), "number of images")
    for i, row in enumerate(table):
        pixels, label = files[i]
        require(label == row[0] and label < 10 and np.array_equal(pixels.ravel(), row[1:]), f"image {i}")


REVIEWS = {
    f"aclImdb/{split}/{label}/{i}_7.txt": f"{split} {label} review {i}"
    for split in ("train", "test") for label in ("neg", "pos") for i in range(5)
}  # fmt: skip


@functools.cache
def imdb_archive() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as tar:
        for name, review in REVIEWS.items():
            member = tarfile.TarInfo(name)
            member.size = len(review)
            tar.addfile(member, io.BytesIO(review.encode()))
    return file.getvalue()


def read_imdb(path: pathlib.Path, sound: bool) -> None:
    official = text.read_archive(path)
    right = {split: [(review.encode(), int("/pos/" in name)) for name, review in REVIEWS.items() if f"/{split}/" in name]
             for split in official}  # fmt: skip
    require(official == right, "reviews")


@functools.cache
def corpus() -> bytes:
    return b"The quick brown fox jumps over the lazy dog, and writes it down.\n" * 60


def read_corpus(path: pathlib.Path, sound: bool) -> None:
    task = lm_text.LMText(path=str(path), context=16, data_dir=str(path.parent / "data"))
    task.prepare()
    copied = b"".join((task.folder / f"{split}.bin").read_bytes() for split in ("train", "valid", "test"))
    require(copied == path.read_bytes(), "the copy")
    first = task.source("train")[0]
    require(first["inputs"].shape == (16,), "a window")


def _numbers(split: str, shard: int):
    for i in range(20):
        yield {"tokens": np.arange(i + shard, dtype=np.uint8), "label": i}


@functools.cache
def record_set() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-records-")) / "numbers"
    tokens = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
    features = tfds.features.FeaturesDict({"tokens": tokens, "label": tfds.features.Scalar(np.int32)})
    records.prepare(folder, features=features, shards={"train": 1}, generate=_numbers, workers=1)
    return folder


def records_file() -> bytes:
    return next(record_set().glob("*.array_record-*")).read_bytes()


def read_records(path: pathlib.Path, sound: bool) -> None:
    folder = path.parent / "numbers"
    shutil.copytree(record_set(), folder)
    path.rename(next(folder.glob("*.array_record-*")))
    source = records.open_split(folder, "train")
    rows = [source[i] for i in range(len(source))]
    right = list(_numbers("train", 0))
    require(len(rows) == len(right), f"{len(rows)} records of {len(right)}")
    for row, due in zip(rows, right):
        require(np.array_equal(row["tokens"], due["tokens"]) and row["label"] == due["label"], f"record {due['label']}")


FORMATS: dict[str, tuple[Callable[[], bytes], Callable[[pathlib.Path, bool], None]]] = {
    "listops.tsv": (listops_tsv, read_listops), "pairs.tsv": (pairs_tsv, read_pairs), "image.png": (png, read_png),
    "metadata.npy": (metadata, read_metadata), "cifar.bin": (cifar, read_cifar), "aclImdb.tar.gz": (imdb_archive, read_imdb),
    "corpus.txt": (corpus, read_corpus), "array_record": (records_file, read_records),
}  # fmt: skip


def case(rng: random.Random) -> Case:
    name = rng.choice(list(FORMATS))
    make, read = FORMATS[name]
    data, how = make(), []
    sound = rng.random() < 0.05
    for _ in range(0 if sound else rng.choice((1, 1, 1, 3))):
        if data:
            data, what = damage(rng, data)
            how.append(what)

    def check() -> str:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            path = pathlib.Path(folder) / name
            path.write_bytes(data)
            try:
                read(path, sound)
            finally:
                partial = [
                    found for found in pathlib.Path(folder).rglob("*") if "incomplete" in found.name or found.suffix == ".part"
                ]
                require(not partial, f"left {partial}")
        return f"right ({'sound' if sound else 'damaged'} input)"

    return Case(f"{name} {'; '.join(how) or 'sound'}", check, "right" if sound else None)
