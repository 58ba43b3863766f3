"""Rows of a decoder's state as places for sequences: each with a stretch of its own, or with blocks of a pool."""

from collections.abc import Sequence

import numpy as np

from efficient_attn.generation.blocks import SCRATCH, BlockAllocator
from efficient_attn.generation.decoding import Decoder, is_all_in_blocks


class ContiguousCache:
    """`rows` places for sequences of at most `length` tokens; all memory is taken at the start.

    `state` is the decoder's; who decodes puts the new one back. Raises `ValueError` where the model has no room for `length`.
    """

    def __init__(self, decoder: Decoder, rows: int, length: int):
        self.decoder, self.rows, self.length = decoder, rows, length
        self.state = decoder.init(rows, length)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have if it is alone."""
        return self.length

    def has_room(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of these lengths can start now, given free rows."""
        return True

    def admit(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Start sequences in these rows, which hold the tokens of their prompts."""
        self.state = self.decoder.reset(self.state, rows, [0] * len(rows))
        self.state = self.decoder.prefill(self.state, rows, prompts)

    def reserve(self, row: int, length: int) -> None:
        """Make room for the sequence to grow to `length` tokens. Raises `OutOfBlocks` where other sequences have it."""

    def tables(self, rows: Sequence[int] | None = None) -> np.ndarray | None:
        """Block tables of rows, all of them by default; None where there are none."""
        return None

    def publish(self, row: int, tokens: Sequence[int]) -> None:
        """Let sequences that begin with these tokens, which the row holds, share them."""

    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i], for all rows."""
        self.fork(range(self.rows), parents)

    def fork(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Start sequences in free rows as copies of others."""
        self.state = self.decoder.copy_rows(self.state, rows, parents)

    def free(self, row: int) -> None:
        """End the sequence of a row."""


class PagedCache(ContiguousCache):
    """Keys and values of softmax attention in blocks, taken as sequences grow; whatever else a layer keeps stays with the row.

    Sequences that begin alike share whole blocks if the model keeps nothing else (`shares`).
    """

    def __init__(self, decoder: Decoder, rows: int, length: int):
        super().__init__(decoder, rows, length)
        self.blocks = BlockAllocator(*decoder.paging)
        self.shares = is_all_in_blocks(self.state)

    @property
    def capacity(self) -> int:
        return min(self.length, (self.blocks.num_blocks - 1) * self.blocks.block_size)

    def has_room(self, lengths: Sequence[int]) -> bool:
        return sum(self.blocks.blocks_for(length) for length in lengths) <= self.blocks.num_free

    def admit(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        waiting = list(zip(rows, prompts, strict=True))
        while waiting:  # those that begin alike in turn, so that each can share what those before it have written
            wave = {self._beginning(row, prompt): (row, prompt) for row, prompt in waiting[::-1]}
            self._admit_together(*zip(*wave.values()))
            waiting = [item for item in waiting if item not in wave.values()]

    def _beginning(self, row: int, prompt: Sequence[int]) -> tuple[int, ...]:
        """What prompts have in common that would share their first block; nobody else's where a prompt shares none."""
        return tuple(prompt[: self.blocks.block_size]) if self.shares and prompt else (-1 - row,)

    def _admit_together(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        held = [self.blocks.add(row, prompt if self.shares else ()) for row, prompt in zip(rows, prompts)]
        for row, prompt in zip(rows, prompts):
            self.reserve(row, len(prompt))
        self.state = self.decoder.reset(self.state, rows, held)
        left = [prompt[n:] for prompt, n in zip(prompts, held)]
        self.state = self.decoder.prefill(self.state, rows, left, self.tables(rows))
        for row, prompt in zip(rows, prompts):
            self.publish(row, prompt)

    def reserve(self, row: int, length: int) -> None:
        self.state = self.decoder.copy_blocks(self.state, self.blocks.extend(row, length))

    def tables(self, rows: Sequence[int] | None = None) -> np.ndarray:
        rows = range(self.rows) if rows is None else rows
        held = [len(self.blocks.tables[row].blocks) for row in rows if row in self.blocks.tables]
        width = _width(max([*held, 1]))
        idle = [SCRATCH] * width
        return np.array([self.blocks.table(row, width) if row in self.blocks.tables else idle for row in rows], np.int32)

    def publish(self, row: int, tokens: Sequence[int]) -> None:
        if self.shares:
            self.blocks.publish(row, tokens)

    def reorder(self, parents: Sequence[int]) -> None:
        for row, parent in enumerate(parents):
            self.blocks.fork(parent, ("new", row))
        for row in range(self.rows):
            self.blocks.free(row)
            self.blocks.fork(("new", row), row)
            self.blocks.free(("new", row))
        super().fork(range(self.rows), parents)

    def fork(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        for row, parent in zip(rows, parents, strict=True):
            self.blocks.fork(parent, row)
        super().fork(rows, parents)

    def free(self, row: int) -> None:
        self.blocks.free(row)


def _width(blocks: int) -> int:
    """Of tables with room for so many: a power of two or three quarters of one, so that few programs are compiled."""
    power = 1 << (blocks - 1).bit_length()
    return power * 3 // 4 if power >= 4 and blocks <= power * 3 // 4 else power


def new(decoder: Decoder, rows: int, length: int) -> ContiguousCache:
    """The cache that the decoder is made for."""
    return (ContiguousCache if decoder.paging is None else PagedCache)(decoder, rows, length)
