"""The task interface: what a data set must say and give so that the one train loop can run on it.

A task is data only. It is a frozen dataclass whose fields are the keyword arguments of `config.task`; constructing it reads
and writes nothing, so `train.py --check` can print sizes and costs before any data exist. `prepare()` brings the data onto
disk (generates, downloads, or finds them) and is safe to call again; `source(split)` opens a split for random access.

Every example is a dict of NumPy arrays of fixed shape, L being the task's `length`:

    key       classify        match           lm          meaning
    inputs    [L] or [L, F]   [2, L]          [L]         int32 tokens, or float32 channels F
    mask      [L] bool        [2, L] bool     [L] bool    True where there is a real token
    targets   [] int32        [] int32        [L] int32   class, or the token to predict at each position
    weights   [] float32      [] float32      [L] float32 weight of each target in loss and metrics; 0 = ignored

without `mask` in tasks that pad nothing (`padded`), and with `segment_ids` [L] int32 where documents are packed into one row.
Stacked by the pipeline, these are the batch.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

Example = dict[str, np.ndarray]
Head = Literal["classify", "match", "lm"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class TaskError(Exception):
    """Data are missing, damaged or wrongly specified. The message says what is wrong and what to do."""


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split; `source[i]` is the same example every time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Text(Protocol):
    """What a task of text has besides: its tokens as text, which generation reads and writes."""

    stop_token: int
    """The token at which a text ends."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decoder(self) -> Callable[[Sequence[int]], str]:
        """A function that turns more and more tokens of one text to what is new of it, characters whole."""


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Base of every task. Subclasses add their own fields (all with defaults) and define what is abstract here.

    Class attributes: `head` names the model head and loss; `metric` the number that selects the best checkpoint
    (`metric_mode` says whether more is better); `padded` says whether examples may be shorter than `length` (they then have a
    `mask`, which costs every mixer something).
    """

    head: ClassVar[Head]
    metric: ClassVar[str] = "accuracy"
    metric_mode: ClassVar[Literal["max", "min"]] = "max"
    padded: ClassVar[bool] = True
    length_field: ClassVar[str] = "length"  # which argument sets `length`, where one alone does

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Identity of the data: two tasks with equal names hold equal examples. Also the folder's name on disk."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """L, the fixed number of positions of one input."""

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """Classes C (classify, match) or vocabulary V (lm)."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int | None:
        """Number of input tokens, padding (always token 0) included; None where inputs are real-valued."""

    @property
    def channels(self) -> int:
        """F, the channels of a real-valued input (0 for tokens)."""
        return 0

    @property
    @abc.abstractmethod
    def sizes(self) -> Mapping[Split, int]:
        """Number of examples of each split, known without reading any data."""

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, told apart by `segment_ids`."""
        return False

    @property
    def contiguous(self) -> bool:
        """Whether row r of each batch continues row r of the batch before."""
        return False

    @property
    def floors(self) -> Mapping[str, float]:
        """Accuracies (0..1) that simple heuristics reach, to be drawn beside a learning curve. May be empty."""
        return {}

    @abc.abstractmethod
    def cost(self) -> str:
        """One line for `--check`: where the data are or will be, and what getting them costs in time and bytes."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Make the data available on disk, resuming what an earlier call left. Raises `TaskError` if it cannot."""

    @abc.abstractmethod
    def source(self, split: Split) -> Source:
        """Open a prepared split."""


class MapSource:
    """The source whose item i is `fn(base[i])`."""

    def __init__(self, base, fn):
        self.base, self.fn = base, fn

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Example:
        return self.fn(self.base[index])


def sequence_example(tokens: np.ndarray, target: int, length: int) -> Example:
    """The classification example of one token sequence, cut or padded with 0 to `length`."""
    tokens = np.asarray(tokens)[:length]
    inputs = np.zeros(length, np.int32)
    inputs[: len(tokens)] = tokens
    mask = np.arange(length) < len(tokens)
    return {"inputs": inputs, "mask": mask, "targets": np.int32(target), "weights": np.float32(1.0)}
