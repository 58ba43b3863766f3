"""Language modelling on subwords or words of any text: `lm_text` with a tokenizer trained on the corpus and kept beside it.

Needs the tokenizers package (pip install tokenizers) to make the tokens and to read or write text; training on tokens that are
there does without.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from efficient_attn.arguments import lookup
from efficient_attn.tasks.base import SPLITS, Split, TaskError
from efficient_attn.tasks.lm_text import SEPARATOR, LMText, only_writer

DOCUMENT = "<|document|>"
"""Token 0, between documents."""
END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
LINES = 20_000
"""Lines that are encoded at a time."""


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TaskError("lm_tokens needs the tokenizers package: pip install tokenizers") from error
    return tokenizers


def _bpe(size: int) -> tuple[Any, Any]:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, on bytes as GPT-2 has it): any text, and nothing is lost."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    alphabet = t.pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=size, special_tokens=[DOCUMENT], initial_alphabet=alphabet, show_progress=False)
    return tokenizer, t.trainers.BpeTrainer(**options)


def _words(size: int) -> tuple[Any, Any]:
    """What stands between spaces, and the ends of lines; the most frequent words, all others are <unk>."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = t.normalizers.Replace("\n", f" {END_OF_LINE} ")
    tokenizer.pre_tokenizer = t.pre_tokenizers.WhitespaceSplit()
    return tokenizer, t.trainers.WordLevelTrainer(vocab_size=size, special_tokens=[DOCUMENT, UNKNOWN], show_progress=False)


TOKENIZERS: Mapping[str, Callable[[int], tuple[Any, Any]]] = {"bpe": _bpe, "words": _words}
"""By the name that `task.tokenizer` uses: size of the vocabulary -> an untrained tokenizer and its trainer."""


@dataclasses.dataclass(frozen=True)
class LMTokens(LMText):
    """`LMText` whose tokens are subwords or words; the loss is the mean over them, in nats (its exponential is the perplexity).

    The tokenizer is trained on the train split, line by line, and encodes every line by itself. Tokens and tokenizer lie in a
    folder beside the bytes; they are made when the task is first asked for its sizes, since only then these are known. Text must
    be UTF-8.

    Fields besides those of `LMText`, whose `context` counts tokens here:
        tokenizer: one of `TOKENIZERS`. max_vocab: tokens at most, special ones included.
    """

    stop_token: ClassVar[int] = 0

    tokenizer: str = "bpe"
    max_vocab: int = 8192

    def __post_init__(self):
        super().__post_init__()
        lookup(TOKENIZERS, self.tokenizer, "task.tokenizer")
        least = 2 if self.tokenizer == "words" else 257
        if not least < self.max_vocab <= 2**31:
            raise TaskError(f"lm_tokens: max_vocab={self.max_vocab} must be more than {least} and at most 2^31.")

    @property
    def name(self) -> str:
        return f"{super().name}-{self._folder.name}-{self._made['digest']}"

    @property
    def vocab_size(self) -> int:
        return self._made["vocab"]

    @property
    def num_outputs(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """Bytes that are no UTF-8 become U+FFFD."""
        stream, tokenizer = _library().decoders.DecodeStream(skip_special_tokens=True), self._tokenizer
        return lambda tokens: "".join(stream.step(tokenizer, token) or "" for token in tokens)

    def cost(self) -> str:
        counts = ", ".join(f"{split} {count:,}" for split, count in self._lengths.items())
        per_token = sum(self._bytes.values()) / sum(self._lengths.values())
        return f"tokens: {counts}, of {per_token:.2f} bytes; {self.vocab_size:,} different ones; prepared in {self._folder}"

    def prepare(self) -> None:
        super().prepare()
        if (self._folder / "made.json").exists():
            return
        try:
            with only_writer(self._folder):
                if not (self._folder / "made.json").exists():
                    self._make()
        except OSError as error:
            raise TaskError(f"Cannot write the tokens to {self._folder}: {error}") from error

    def tokens(self, split: Split) -> np.ndarray:
        """All tokens of a split, in order."""
        path, count = self._folder / f"{split}.bin", self._made["tokens"][split]
        dtype = np.dtype(self._made["dtype"])
        if not path.exists() or path.stat().st_size != count * dtype.itemsize:
            raise TaskError(f"{path} is missing or damaged. Delete {self._folder}; it will be made again.")
        return np.asarray(np.memmap(path, dtype, mode="r"))

    @property
    def _folder(self) -> pathlib.Path:
        return self.folder / f"{self.tokenizer}{self.max_vocab}"

    @property
    def _lengths(self) -> Mapping[Split, int]:
        counts = self._made["tokens"]
        for split, needed in {"train": self.context + 1, "valid": 2, "test": 2}.items():
            if counts[split] < needed:
                raise TaskError(f"lm_tokens: the {split} split has {counts[split]} tokens and needs {needed}: give more text.")
        return counts

    @functools.cached_property
    def _made(self) -> Mapping[str, Any]:
        """What was made: vocab, dtype, tokens by split, digest of the tokenizer."""
        self.prepare()
        return json.loads((self._folder / "made.json").read_text())

    @functools.cached_property
    def _tokenizer(self) -> Any:
        self.prepare()
        return _library().Tokenizer.from_file(str(self._folder / "tokenizer.json"))

    def _make(self) -> None:
        """Train the tokenizer and encode the splits; `made.json` is written last, when all is whole."""
        tokenizer, trainer = TOKENIZERS[self.tokenizer](self.max_vocab)
        lines = (line for document in self._documents("train") for line in document)
        tokenizer.train_from_iterator(lines, trainer)
        vocab = tokenizer.get_vocab_size()
        dtype = np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)
        counts = {split: self._encode(tokenizer, split, dtype) for split in SPLITS}
        tokenizer.save(str(self._folder / "tokenizer.json"))
        digest = hashlib.sha256((self._folder / "tokenizer.json").read_bytes()).hexdigest()[:8]
        made = {"vocab": vocab, "dtype": dtype.name, "tokens": counts, "digest": digest}
        aside = self._folder / "incomplete.made.json"
        aside.write_text(json.dumps(made))
        os.replace(aside, self._folder / "made.json")

    def _encode(self, tokenizer: Any, split: Split, dtype: np.dtype) -> int:
        """Write the tokens of a split; returns how many there are."""
        count = 0
        with open(self._folder / f"{split}.bin", "wb") as file:
            for number, document in enumerate(self._documents(split)):
                ids = [0] if number else []
                while lines := list(itertools.islice(document, LINES)):
                    ids += [i for encoding in tokenizer.encode_batch(lines) for i in encoding.ids]
                    count += file.write(np.array(ids, dtype).tobytes()) // dtype.itemsize
                    ids = []
                count += file.write(np.array(ids, dtype).tobytes()) // dtype.itemsize
            file.flush()
            os.fsync(file.fileno())
        return count

    def _documents(self, split: Split) -> Iterator[Iterator[str]]:
        """The lines of each document, with their ends. Each must be read before the next."""
        data = super().tokens(split)
        edges = [-1, *np.flatnonzero(data == SEPARATOR[0]).tolist(), len(data)]
        for start, stop in itertools.pairwise(edges):
            yield self._lines(data[start + 1 : stop], split)

    def _lines(self, document: np.ndarray, split: Split) -> Iterator[str]:
        ends = [0, *(np.flatnonzero(document == ord("\n")) + 1).tolist(), len(document)]
        for start, stop in itertools.pairwise(ends):
            with self._utf8(split):
                if line := document[start:stop].tobytes().decode():
                    yield line

    @contextlib.contextmanager
    def _utf8(self, split: Split) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise TaskError(f"lm_tokens: the {split} split of {self._root} is not UTF-8 ({error}); use lm_text.") from error
