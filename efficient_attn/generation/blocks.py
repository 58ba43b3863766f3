"""Who holds which block of a paged cache: block tables, reference counts, copy-on-write, prefix sharing.

PagedAttention's block manager (Kwon et al. 2023, arXiv 2309.06180, sections 4.2 to 4.4), as bookkeeping on the host that
knows no arrays. The keys and values of a sequence lie in blocks of `block_size` tokens, all full but the last, anywhere in the
pool; the sequence's block table lists them in order. Several sequences may list a block, until one of them writes into it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

SCRATCH = 0
"""The block that no sequence gets: rows without a sequence write there, and unused entries of tables name it."""

Copy = tuple[int, int]
"""From block, to block."""


class OutOfBlocks(Exception):
    """The pool has too few free blocks for what was asked; nothing was changed."""


@dataclasses.dataclass
class Table:
    """The blocks of a sequence, in the order of its tokens; how many tokens they hold; digests of the full blocks published."""

    blocks: list[int]
    length: int
    digests: list[bytes]


class BlockAllocator:
    """Tables of the sequences that are there, by any hashable key.

    num_blocks: of the pool, the scratch block among them. block_size: tokens in a block.

    Blocks of sequences that have ended stay findable by their contents until they are needed (least recently freed first).
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"num_blocks={num_blocks} must be at least 2 (one is scratch) and block_size={block_size} at least 1"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tables: dict[object, Table] = {}
        self._references = [0] * num_blocks
        self._free = dict.fromkeys(range(1, num_blocks))  # in order; a dict for removal from the middle
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence lists."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many tables list the block."""
        return self._references[block]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that this many tokens take."""
        return -(-tokens // self.block_size)

    def add(self, sequence: object, tokens: Sequence[int] = ()) -> int:
        """Start the table of a new sequence, which is about to begin with `tokens`, and return how many of them it already holds.

        Those are whole blocks of the same tokens after the same prefix, which it now shares.
        """
        if sequence in self.tables:
            raise ValueError(f"sequence {sequence!r} has a table already")
        table = self.tables[sequence] = Table([], 0, [])
        for digest in self._digests(tokens):
            block = self._block_of.get(digest)
            if block is None:
                break
            self._hold(block)
            table.blocks.append(block)
            table.digests.append(digest)
        table.length = len(table.blocks) * self.block_size
        return table.length

    def extend(self, sequence: object, length: int) -> list[Copy]:
        """Make room for the sequence to grow to `length` tokens; the result is what to copy before they are written.

        A last block that others list too is replaced by a copy (copy-on-write). Raises `OutOfBlocks`.
        """
        table = self.tables[sequence]
        if length < table.length:
            raise ValueError(f"sequence {sequence!r} has {table.length} tokens and cannot shrink to {length}")
        is_shared = length > table.length and table.length % self.block_size and self._references[table.blocks[-1]] > 1
        needed = self.blocks_for(length) - len(table.blocks)
        if needed + bool(is_shared) > self.num_free:
            raise OutOfBlocks(f"{needed + bool(is_shared)} blocks needed and {self.num_free} free")
        copies = []
        if is_shared:
            shared, own = table.blocks[-1], self._take()
            self._release(shared)
            table.blocks[-1] = own
            copies.append((shared, own))
        table.blocks += [self._take() for _ in range(needed)]
        table.length = length
        return copies

    def fork(self, parent: object, child: object) -> None:
        """Give a new sequence the blocks of another; they share all of them until one of them writes."""
        if child in self.tables:
            raise ValueError(f"sequence {child!r} has a table already")
        table = self.tables[parent]
        for block in table.blocks:
            self._hold(block)
        self.tables[child] = Table(list(table.blocks), table.length, list(table.digests))

    def free(self, sequence: object) -> None:
        """Drop the table of a sequence; blocks that no other lists become free, the last ones first to be taken."""
        for block in reversed(self.tables.pop(sequence).blocks):
            self._release(block)

    def publish(self, sequence: object, tokens: Sequence[int]) -> None:
        """Say what the sequence holds, so that others that begin alike share its full blocks. `tokens` are those written."""
        table = self.tables[sequence]
        if len(tokens) > table.length:
            raise ValueError(f"sequence {sequence!r} has {table.length} tokens, not {len(tokens)}")
        for digest in self._digests(tokens, table.digests):
            block = table.blocks[len(table.digests)]
            table.digests.append(digest)
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest], self._digest_of[block] = block, digest

    def table(self, sequence: object, width: int) -> list[int]:
        """The table of a sequence with `width` entries."""
        blocks = self.tables[sequence].blocks
        if len(blocks) > width:
            raise ValueError(f"sequence {sequence!r} has {len(blocks)} blocks, more than {width}")
        return blocks + [SCRATCH] * (width - len(blocks))

    def _digests(self, tokens: Sequence[int], known: Sequence[bytes] = ()):
        """Of each full block of `tokens` after those known: of its tokens and all before them."""
        digest = known[-1] if known else b""
        for end in range((len(known) + 1) * self.block_size, len(tokens) + 1, self.block_size):
            block = np.asarray(tokens[end - self.block_size : end], np.int32)
            digest = hashlib.blake2b(digest + block.tobytes(), digest_size=16).digest()
            yield digest

    def _take(self) -> int:
        """The block that has been free for longest, with one reference; what it held is forgotten."""
        block = next(iter(self._free))
        if block in self._digest_of:
            del self._block_of[self._digest_of.pop(block)]
        self._hold(block)
        return block

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if not self._references[block]:
            self._free[block] = None
