"""BlockBERT's block-wise attention (Qiu et al. 2019, arXiv 1911.02972)."""

from collections.abc import Sequence

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.attention import Attention
from kernels.attention import masks


class BlockBERT(Attention):
    """Each head sees one block of keys from each block of queries (section 3.1): block i sees block pi(i).

    The permutations pi are the cyclic shifts, of which 0, the identity, makes a head local. The last block is shorter where
    the blocks do not divide the sequence. Their size is rounded up, which leaves fewer blocks to short sequences (9 positions
    make three blocks of 3, not four), and shifts then count modulo these.

    num_blocks: n, 2 or 3 in the paper.
    heads_per_shift: heads that use shift 0, 1, ..., n - 1; they sum to `num_heads` (in the paper, of 12 heads, (10, 2) for
        n = 2 and (8, 2, 2) for n = 3). Empty: all heads dealt out evenly, shift 0 first.
    """

    num_blocks: int = 2
    heads_per_shift: Sequence[int] = ()

    shift_invariant = False

    def pattern(self, length: int) -> masks.Mask:
        size = -(-length // self.num_blocks)
        blocks = -(-length // size)
        shifted = [masks.permuted(size, [(i + shift) % blocks for i in range(blocks)]) for shift in self._shifts()]
        return masks.PerHead(tuple(shifted))

    def _shifts(self) -> list[int]:
        """The shift of each head."""
        if not self.heads_per_shift:
            return sorted(head % self.num_blocks for head in range(self.num_heads))
        is_short = len(self.heads_per_shift) <= self.num_blocks
        if not is_short or min(self.heads_per_shift) < 0 or sum(self.heads_per_shift) != self.num_heads:
            raise ConfigError(
                f"blockbert: heads_per_shift={tuple(self.heads_per_shift)} must have at most num_blocks={self.num_blocks} "
                f"entries, none negative, which sum to num_heads={self.num_heads}"
            )
        return [shift for shift, heads in enumerate(self.heads_per_shift) for _ in range(heads)]
