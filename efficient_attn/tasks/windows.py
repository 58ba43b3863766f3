"""Language-model examples from one long run of tokens: windows, and contiguous streams. Token 0 stands between documents."""

import dataclasses

import numpy as np

from efficient_attn.tasks.base import Example, TaskError


class Windows:
    """Windows of `context` tokens at `count` equally spaced starts, 0 <= start < span; each target is the token after its input.

    Window i starts at floor(i span / count). Positions whose target lies past the end of the data have token 0 and weight 0.
    With `documents`, segment_ids are the number of separators up to and with each position.
    """

    def __init__(self, data: np.ndarray, context: int, span: int, count: int, *, documents: bool = False):
        self._data, self._offsets, self._span, self._count = data, np.arange(context + 1), span, count
        self._separators = np.flatnonzero(data == 0) if documents else None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Example:
        """The windows `indices` [n], stacked: every array is [n, context]."""
        if np.min(indices) < 0 or np.max(indices) >= self._count:
            raise IndexError(f"window indices must be in [0, {self._count}); got {np.min(indices)}..{np.max(indices)}")
        starts = np.asarray(indices, np.int64) * self._span // self._count
        places = starts[:, None] + self._offsets
        windows = self._data[np.minimum(places, len(self._data) - 1)].astype(np.int32)
        inside = places[:, 1:] < len(self._data)
        return {
            "inputs": windows[:, :-1] * inside,
            "targets": windows[:, 1:] * inside,
            "weights": inside.astype(np.float32),
            **self._segments(places[:, :-1]),
        }

    def _segments(self, places: np.ndarray) -> Example:
        if self._separators is None:
            return {}
        return {"segment_ids": np.searchsorted(self._separators, places, side="right").astype(np.int32)}


class EvaluationStreams(Windows):
    """Consecutive windows that evaluation reads as contiguous streams."""

    contiguous = True

    def order(self, seed: int, batch_size: int):
        raise TaskError("the streams of a validation or test split are for evaluation, not for training.")


class Streams(Windows):
    """The data as a circle that B readers go round, each from where the next one started on; example i starts at token i.

    Where the circle closes, what the readers remember of the end is of another document, and the target across counts nothing.
    """

    contiguous = True

    def __init__(self, data: np.ndarray, context: int, *, documents: bool = False):
        super().__init__(data, context, len(data), len(data) // context, documents=documents)

    def batch(self, indices: np.ndarray) -> Example:
        """The windows that start at the token positions `indices` [n], counted on from round to round."""
        places = np.asarray(indices, np.int64)[:, None] + self._offsets
        rounds, places = np.divmod(places, len(self._data))
        windows = self._data[places].astype(np.int32)
        segments = self._segments(places[:, :-1])
        if segments:
            segments = {"segment_ids": segments["segment_ids"] + rounds[:, :-1].astype(np.int32) * (len(self._separators) + 1)}
        weights = (places[:, 1:] > 0).astype(np.float32)
        return {"inputs": windows[:, :-1], "targets": windows[:, 1:], "weights": weights, **segments}

    def order(self, seed: int, batch_size: int) -> "StreamOrder":
        """Row r of step t starts at shift + floor(r T / B) + t context; the seed draws the shift."""
        shift = np.random.Generator(np.random.Philox(key=[seed, 0])).integers(len(self._data))
        return StreamOrder(int(shift), len(self._data), len(self._offsets) - 1, batch_size)


@dataclasses.dataclass(frozen=True)
class StreamOrder:
    """Where each row of each step starts, of all rows in turn."""

    shift: int
    tokens: int
    context: int
    batch_size: int

    def __getitem__(self, positions: slice) -> np.ndarray:
        step, row = np.divmod(np.arange(positions.start, positions.stop), self.batch_size)
        return self.shift + row * self.tokens // self.batch_size + step * self.context
