"""Byte-level language modelling on any file or folder of text: predict the next byte.

Tokens are byte values, V = 256. Byte 0 does not occur in text: it stands between documents and pads. The corpus is copied
once, as three flat files of bytes, and read through a memory map.
"""

import codecs
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import math
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from efficient_attn.tasks import corpora
from efficient_attn.tasks.base import SPLITS, Head, Source, Split, Task, TaskError
from efficient_attn.tasks.windows import EvaluationStreams, Streams, Windows

SEPARATOR = b"\0"
CHUNK = 2**24  # bytes read at a time
MAX_EXAMPLES = 4_000_000  # default bound on the windows of train: shuffling takes 4 bytes and about 40 ns each
ORDERS: Mapping[str, str] = {"shuffled": "", "streams": "-streams"}
"""How training reads, and what the data's name says of it."""
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes start..stop-1 of one file."""

    path: pathlib.Path
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class LMText(Task):
    """Byte-level language modelling; the loss is the mean over bytes, in nats (divide by log 2 for bits per byte).

    Splits, each a run of documents with one zero byte between any two:
      - a folder with train.txt, valid.txt and test.txt: those; or with folders train, valid and test: their files, each a
        document;
      - any other folder: every file in it and below, hidden ones apart, is one document of one split. Files are dealt in an
        order that depends on their sizes alone, first to test, then valid, as long as these stay within their fraction of the
        bytes, else to train. Files of equal size go to the same split, so no two splits hold copies of one file;
      - a file: cut in three, train first, then valid, then test;
      - "" (the default): the Python source files of the running Python's standard library, less its tests, as a folder. They
        are the same wherever the release is, unless a distributor patched them; the digest in the name tells.

    Train example i is the window that starts at a byte offset, and there is one for every offset, so that batches are uniform
    draws of offsets without replacement (nanoGPT draws with replacement). So an epoch reads every byte `context` times: give
    durations in steps. `num_examples` > 0 takes that many equally spaced offsets instead; train size / context of them read
    the text about once. Above 4 million offsets the default is 4 million.

    With order="streams", for models with memory, row r of each batch continues row r of the batch before, in training and in
    evaluation: B readers, evenly spread over the text, each of which goes on to the end and then from its start.

    Windows run across the ends of documents. With documents=True they carry segment_ids that count the separators, so that
    nothing flows between documents, nor in a memory from one to the next; a separator belongs to the document it precedes.

    Valid and test are consecutive, non-overlapping windows: every byte but the first is predicted exactly once, from at most
    `context` bytes before it (those of its window). The last window is padded.

    Fields:
        path: a file, a folder, or "".
        corpus: without a path, a published corpus of `corpora.CORPORA`, downloaded into data_dir when it is first asked about.
        context: L, bytes in a window.
        valid_fraction, test_fraction: of the bytes; not used where the folder names its splits.
        num_examples: windows of train; 0 means as above. Of streams there are size / context.
        num_eval: windows of valid and of test at most, from their start; 0 means all.
        order: one of `ORDERS`. documents: keep documents apart.
        data_dir: folder of all data; the corpus is copied into a folder of its own there.

    Constructing looks at nothing. `sizes` lists the files; `name` and `cost` read them once, since the name holds a digest of
    their contents. All of them raise `TaskError` if the path is missing, not text, or too short for its splits.
    """

    head: ClassVar[Head] = "lm"
    padded: ClassVar[bool] = False
    metric: ClassVar[str] = "loss"
    metric_mode: ClassVar[Literal["max", "min"]] = "min"
    length_field: ClassVar[str] = "context"
    stop_token: ClassVar[int] = SEPARATOR[0]

    path: str = ""
    corpus: str = ""
    context: int = 256
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    num_examples: int = 0
    num_eval: int = 0
    order: str = "shuffled"
    documents: bool = False
    data_dir: str = "data"

    def __post_init__(self):
        if self.context < 1 or min(self.num_examples, self.num_eval) < 0:
            raise TaskError(f"lm_text: context must be positive, num_examples and num_eval not negative; got {self}.")
        if min(self.valid_fraction, self.test_fraction) <= 0 or self.valid_fraction + self.test_fraction >= 1:
            raise TaskError(f"lm_text: valid_fraction and test_fraction must be positive and sum to less than 1; got {self}.")

        if self.corpus and self.corpus not in corpora.CORPORA:
            raise TaskError(f"lm_text: corpus must be one of {', '.join(corpora.CORPORA)}; got {self.corpus!r}.")
        if self.order not in ORDERS or (self.order == "streams" and self.num_examples):
            raise TaskError(f"lm_text: order must be one of {', '.join(ORDERS)}, and streams go with num_examples=0; got {self}.")

    @property
    def name(self) -> str:
        kept_apart = "-documents" if self.documents else ""
        bounded = f"-eval{self.num_eval}" if self.num_eval else ""
        return f"{self.folder.name}-context{self.context}-n{self.sizes['train']}{ORDERS[self.order]}{kept_apart}{bounded}"

    @property
    def packed(self) -> bool:
        return self.documents

    @property
    def contiguous(self) -> bool:
        return self.order == "streams"

    @property
    def folder(self) -> pathlib.Path:
        """Where the copy of the corpus is: the same for every context and num_examples."""
        stem = (
            re.sub(r"\W+", "_", self._root.resolve().stem) if self.path or self.corpus else f"python{platform.python_version()}"
        )
        return pathlib.Path(self.data_dir) / f"lm_text-{stem}-{self._digest}"

    @property
    def length(self) -> int:
        return self.context

    @property
    def num_outputs(self) -> int:
        return 256

    @property
    def vocab_size(self) -> int:
        return 256

    @functools.cached_property
    def sizes(self) -> Mapping[Split, int]:
        offsets = self._lengths["train"] - self.context
        most = self.num_eval or math.inf
        evaluated = {split: min(most, math.ceil((self._lengths[split] - 1) / self.context)) for split in ("valid", "test")}
        windows = self._lengths["train"] // self.context if self.contiguous else min(offsets, MAX_EXAMPLES)
        return {"train": self.num_examples or windows, **evaluated}

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="surrogateescape"))

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Bytes that are no UTF-8 become U+FFFD."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda tokens: utf8.decode(bytes(tokens))

    def cost(self) -> str:
        counts = ", ".join(f"{split} {count:,}" for split, count in self._bytes.items())
        if self._is_prepared():
            return f"bytes: {counts}; prepared in {self.folder}"
        seconds = math.ceil(sum(self._bytes.values()) / 200e6)
        return f"bytes: {counts}; to be copied from {self._root} to {self.folder} in about {seconds} s"

    def prepare(self) -> None:
        if self._is_prepared():
            return
        try:
            with only_writer(self.folder):
                if not self._is_prepared():
                    self._write()
        except OSError as error:
            raise TaskError(f"Cannot copy the text of {self._root} to {self.folder}: {error}") from error

    def source(self, split: Split) -> Source:
        data = self.tokens(split)
        if split == "train" and self.contiguous:
            return Streams(data, self.context, documents=self.documents)
        if split == "train":
            return Windows(data, self.context, len(data) - self.context, self.sizes["train"], documents=self.documents)
        kind = EvaluationStreams if self.contiguous else Windows
        return kind(data, self.context, self.sizes[split] * self.context, self.sizes[split], documents=self.documents)

    def tokens(self, split: Split) -> np.ndarray:
        """All bytes of a prepared split, in order."""
        path = self.folder / f"{split}.bin"
        if not self._is_prepared():
            raise TaskError(f"{path} is missing: call the task's prepare() first (train.py does).")
        return np.asarray(np.memmap(path, np.uint8, mode="r"))

    @property
    def _root(self) -> pathlib.Path:
        if self.corpus and not self.path:
            return corpora.locate(self.corpus, pathlib.Path(self.data_dir))
        return pathlib.Path(self.path or sysconfig.get_path("stdlib")).expanduser()

    @functools.cached_property
    def _pieces(self) -> Mapping[Split, list[Piece]]:
        """The documents of each split, found by listing files only."""
        fractions = {"test": self.test_fraction, "valid": self.valid_fraction}
        if not self._root.exists():
            raise TaskError(f"lm_text: no file or folder {self._root}; give task.path, or '' for Python's standard library.")
        if self._root.is_file():
            return _cut(self._root, fractions)
        named = {split: self._root / f"{split}.txt" for split in SPLITS}
        folders = {split: self._root / split for split in SPLITS}
        if all(path.is_dir() for path in folders.values()):
            return {split: _text_files(path, library=False) for split, path in folders.items()}
        present = [path.name for path in named.values() if path.is_file()]
        if len(present) == len(named):
            return {split: [Piece(path, 0, path.stat().st_size)] for split, path in named.items()}
        if present:
            raise TaskError(f"lm_text: {self._root} holds {present}; expected all or none of train.txt, valid.txt, test.txt.")
        return _deal(_text_files(self._root, library=not (self.path or self.corpus)), fractions)

    @property
    def _lengths(self) -> Mapping[Split, int]:
        """Tokens of each split."""
        return self._bytes

    @functools.cached_property
    def _bytes(self) -> Mapping[Split, int]:
        """Bytes of each split, separators included."""
        counts = {}
        for split, needed in {"train": self.context + 1, "valid": 2, "test": 2}.items():
            pieces = self._pieces[split]
            counts[split] = sum(piece.stop - piece.start for piece in pieces) + max(len(pieces) - 1, 0) * len(SEPARATOR)
            if counts[split] < needed:
                raise TaskError(
                    f"lm_text: the {split} split of {self._root} has {counts[split]} bytes and needs {needed} (context="
                    f"{self.context}). Give more text, a smaller context, other fractions, one file instead of few (a file "
                    f"is cut, a folder is split by files), or a folder with train.txt, valid.txt and test.txt."
                )
        return counts

    @functools.cached_property
    def _digest(self) -> str:
        """Of the contents of the three splits."""
        digest = hashlib.sha256(repr(self._bytes).encode())
        for split in SPLITS:
            for chunk in _chunks(self._pieces[split]):
                digest.update(chunk)
        return digest.hexdigest()[:12]

    def _is_prepared(self) -> bool:
        """Whether the copy is there. Raises `TaskError` if it is but has another size."""
        for split in SPLITS:
            path = self.folder / f"{split}.bin"
            if not path.exists():
                return False
            if path.stat().st_size != self._bytes[split]:
                raise TaskError(
                    f"{path} has {path.stat().st_size} bytes, expected {self._bytes[split]}: it is damaged. Delete "
                    f"{self.folder}; it will be made again."
                )
        return True

    def _write(self) -> None:
        """Writes the three files under other names, and gives them theirs when all are whole and as the name says."""
        aside = {split: self.folder / f"incomplete.{split}.bin" for split in SPLITS}
        try:
            digest = hashlib.sha256(repr(self._bytes).encode())
            for split, path in aside.items():
                with open(path, "wb") as file:
                    for chunk in _chunks(self._pieces[split]):
                        digest.update(chunk)
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
            if digest.hexdigest()[:12] != self._digest:
                raise TaskError(f"lm_text: the text in {self._root} changed while it was being read. Start again.")
            for split, path in aside.items():
                path.rename(self.folder / f"{split}.bin")
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Make the folder and hold its lock: one writer at a time; the system drops the lock of a dead one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _chunks(pieces: list[Piece]) -> Iterator[bytes]:
    """The bytes of the pieces, a separator between any two. Raises `TaskError` on a byte 0, which text does not hold."""
    for number, piece in enumerate(pieces):
        if number:
            yield SEPARATOR
        try:
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                left = piece.stop - piece.start
                while chunk := file.read(min(CHUNK, left)):
                    if SEPARATOR in chunk:
                        raise TaskError(f"lm_text: {piece.path} holds a zero byte, so it is not text. Take it out of the corpus.")
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise TaskError(f"lm_text: cannot read {piece.path}: {error}") from error


def _cut(path: pathlib.Path, fractions: Mapping[Split, float]) -> Mapping[Split, list[Piece]]:
    """One file in three: train, valid, test, in this order."""
    size = path.stat().st_size
    valid, test = round(size * (1 - fractions["valid"] - fractions["test"])), round(size * (1 - fractions["test"]))
    return {"train": [Piece(path, 0, valid)], "valid": [Piece(path, valid, test)], "test": [Piece(path, test, size)]}


def _text_files(root: pathlib.Path, library: bool) -> list[Piece]:
    """Every file below `root` that is neither hidden nor empty, sorted; of the standard library, its own source files."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and not (library and name in NOT_LIBRARY)]
        for name in names:
            path = pathlib.Path(folder, name)
            generated = name.startswith("_sysconfigdata")  # written when Python was built, differs between machines
            if name.startswith(".") or (library and (path.suffix != ".py" or generated)) or not path.is_file():
                continue
            if size := path.stat().st_size:
                files.append(Piece(path, 0, size))
    if not files:
        raise TaskError(f"lm_text: {root} holds no {'Python source' if library else 'text'} files; give task.path.")
    return sorted(files, key=lambda piece: piece.path.as_posix())


def _deal(files: list[Piece], fractions: Mapping[Split, float]) -> Mapping[Split, list[Piece]]:
    """Whole files to splits, those of one size together, sizes in the order of their hash."""
    total = sum(piece.stop for piece in files)
    room = {split: fraction * total for split, fraction in fractions.items()} | {"train": math.inf}
    by_size: dict[int, int] = {}
    for piece in files:
        by_size[piece.stop] = by_size.get(piece.stop, 0) + piece.stop
    owner: dict[int, Split] = {}
    for size in sorted(by_size, key=lambda size: hashlib.sha256(str(size).encode()).digest()):
        owner[size] = next(split for split in room if room[split] >= by_size[size])
        room[owner[size]] -= by_size[size]
    return {split: [piece for piece in files if owner[piece.stop] == split] for split in SPLITS}
