"""The block allocator: nothing leaks, nothing is written while shared, and at most one block of a sequence is partly empty."""

import collections
import random

import pytest

from efficient_attn.generation.blocks import SCRATCH, BlockAllocator, OutOfBlocks


def check(allocator: BlockAllocator) -> None:
    """What holds after every step."""
    listed = collections.Counter(block for table in allocator.tables.values() for block in table.blocks)
    assert SCRATCH not in listed
    assert all(allocator.references(block) == listed[block] for block in range(allocator.num_blocks))
    assert allocator.num_free == allocator.num_blocks - 1 - len(listed)
    for table in allocator.tables.values():
        assert len(set(table.blocks)) == len(table.blocks) == allocator.blocks_for(table.length)
        assert len(table.blocks) * allocator.block_size - table.length < allocator.block_size


class Store:
    """What a pool would hold: the token in each place of each block, written as the allocator says."""

    def __init__(self, allocator: BlockAllocator):
        self.allocator = allocator
        self.tokens = {}  # (block, place) -> token
        self.expected = {}  # sequence -> its tokens

    def read(self, sequence) -> list[int]:
        size = self.allocator.block_size
        blocks = self.allocator.tables[sequence].blocks
        return [self.tokens[blocks[i // size], i % size] for i in range(self.allocator.tables[sequence].length)]

    def write(self, sequence, new: list[int]) -> None:
        size, old = self.allocator.block_size, self.expected[sequence]
        for source, target in self.allocator.extend(sequence, len(old) + len(new)):
            self.tokens |= {(target, i): self.tokens[source, i] for i in range(size) if (source, i) in self.tokens}
        blocks = self.allocator.tables[sequence].blocks
        for i, token in enumerate(new, start=len(old)):
            self.tokens[blocks[i // size], i % size] = token
        self.expected[sequence] = old + new


def test_random_steps_leak_nothing_and_mix_nothing_up():
    draw, allocator = random.Random(0), BlockAllocator(num_blocks=24, block_size=4)
    store, refused, shared = Store(allocator), 0, 0
    for step in range(10_000):
        alive = list(allocator.tables)
        action = draw.choice(["add", "extend", "extend", "fork", "free"])
        if action == "add" and len(alive) < 8:
            prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 14))]
            held = allocator.add(step, prompt)
            store.expected[step] = prompt[:held]
            shared += held
        elif action == "fork" and alive and len(alive) < 8:
            parent = draw.choice(alive)
            allocator.fork(parent, step)
            store.expected[step] = store.expected[parent]
        elif action == "extend" and alive:
            sequence = draw.choice(alive)
            try:
                store.write(sequence, [draw.randrange(2) for _ in range(draw.randrange(6))])
                allocator.publish(sequence, store.expected[sequence])
            except OutOfBlocks:
                refused += 1
        elif action == "free" and alive:
            sequence = draw.choice(alive)
            allocator.free(sequence)
            del store.expected[sequence]
        check(allocator)
        if step % 20 == 0:
            assert all(store.read(sequence) == tokens for sequence, tokens in store.expected.items())
    assert refused and shared  # both were met
    for sequence in list(allocator.tables):
        allocator.free(sequence)
    check(allocator)
    assert allocator.num_free == 23


def test_forks_share_until_one_writes():
    allocator = BlockAllocator(num_blocks=10, block_size=4)
    allocator.add("a")
    allocator.extend("a", 6)
    before = list(allocator.tables["a"].blocks)
    allocator.fork("a", "b")
    assert allocator.tables["b"].blocks == before and allocator.num_free == 9 - 2
    [(source, target)] = allocator.extend("b", 7)
    assert source == before[1] and allocator.tables["b"].blocks == [before[0], target]
    assert allocator.extend("a", 8) == [] and allocator.tables["a"].blocks == before, "the last one to write owns the block"
    allocator.fork("a", "c")
    assert allocator.extend("c", 9) == [], "a full block is never written again, so nothing is copied"
    assert allocator.tables["c"].blocks[:2] == before


def test_equal_beginnings_share_whole_blocks_also_of_ended_sequences():
    allocator = BlockAllocator(num_blocks=6, block_size=2)
    assert allocator.add("a", [1, 2, 3]) == 0
    allocator.extend("a", 3)
    allocator.publish("a", [1, 2, 3])
    assert allocator.add("b", [1, 2, 4, 5]) == 2 and allocator.tables["b"].blocks == allocator.tables["a"].blocks[:1]
    assert allocator.add("c", [2, 2, 3]) == 0
    first = allocator.tables["a"].blocks[0]
    for sequence in "abc":
        allocator.free(sequence)
    assert allocator.num_free == 5
    assert allocator.add("d", [1, 2]) == 2 and allocator.tables["d"].blocks == [first]
    allocator.free("d")
    allocator.add("e")
    allocator.extend("e", 10)  # every block is taken, and what they held is forgotten
    allocator.free("e")
    assert allocator.add("f", [1, 2]) == 0


def test_what_a_block_holds_is_told_apart_by_all_before_it():
    allocator = BlockAllocator(num_blocks=10, block_size=2)
    allocator.add("a")
    for end in (2, 4):  # published as it grows
        allocator.extend("a", end)
        allocator.publish("a", [1, 2, 3, 4][:end])
    assert allocator.add("b", [1, 2, 3, 4, 5]) == 4
    assert allocator.add("c", [9, 9, 3, 4, 5]) == 0
    allocator.extend("c", 4)
    allocator.publish("c", [9, 9, 3, 4])
    assert allocator.add("d", [9, 9, 3, 4]) == 4 and allocator.tables["d"].blocks == allocator.tables["c"].blocks


def test_what_does_not_fit_changes_nothing():
    allocator = BlockAllocator(num_blocks=4, block_size=2)
    allocator.add("a")
    allocator.extend("a", 3)
    allocator.fork("a", "b")
    with pytest.raises(OutOfBlocks, match="2 blocks needed and 1 free"):
        allocator.extend("b", 5)  # one to copy, one to grow
    check(allocator)
    assert allocator.tables["b"].length == 3
    assert len(allocator.extend("b", 4)) == 1


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="num_blocks=1 must be at least 2"):
        BlockAllocator(1, 4)
    allocator = BlockAllocator(4, 2)
    allocator.add("a")
    allocator.extend("a", 3)
    with pytest.raises(ValueError, match="has a table already"):
        allocator.add("a")
    with pytest.raises(ValueError, match="cannot shrink to 2"):
        allocator.extend("a", 2)
    with pytest.raises(ValueError, match="has 3 tokens, not 4"):
        allocator.publish("a", [1, 2, 3, 4])
    with pytest.raises(ValueError, match="2 blocks, more than 1"):
        allocator.table("a", 1)
