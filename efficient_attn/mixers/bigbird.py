"""BigBird's block-sparse attention: window, global and random blocks (Zaheer et al. 2020, arXiv 2007.14062, section 2)."""

from efficient_attn.arguments import ConfigError
from efficient_attn.mixers.attention import Attention
from kernels.attention import masks


class BigBird(Attention):
    """Each block of queries sees the blocks around it, global tokens, and blocks drawn once and for all for each head.

    The last block is shorter where `block_size` does not divide the sequence. Bidirectional only: global tokens see everything.

    block_size: b, 64 in the paper.
    window: blocks of the window, an odd number (3): the own one and (window - 1) / 2 on either side.
    num_random: r, random blocks (3) for each block of queries and each head, none of them seen already.
    global_tokens: 0 is the internal construction (ITC), whose first and last block are global; n makes the first n tokens
        global instead, the external construction (ETC), where the task or the model puts them before the sequence.
    seed: of the random blocks. Layers draw the same ones unless given different seeds, by a tuple of mixer dicts.
    """

    block_size: int = 64
    window: int = 3
    num_random: int = 3
    global_tokens: int = 0
    seed: int = 0

    shift_invariant = False

    def pattern(self, length: int) -> masks.Mask:
        seen, blocks = self.without_random(length), -(-length // self.block_size)
        seeds = range(self.seed * self.num_heads, (self.seed + 1) * self.num_heads)
        drawn = tuple(masks.random_blocks(self.block_size, blocks, self.num_random, s, exclude=seen) for s in seeds)
        return seen | masks.PerHead(drawn)

    def without_random(self, length: int) -> masks.Mask:
        """The window and the global tokens, which all heads share."""
        if self.window % 2 == 0:
            raise ConfigError(f"bigbird: window={self.window} must be odd: the own block and as many before it as after it")
        size, beside = self.block_size, self.window // 2
        if self.global_tokens:
            positions = range(min(self.global_tokens, length))
        else:
            positions = {*range(min(size, length)), *range((length - 1) // size * size, length)}
        return masks.BlockLocal(size, beside, beside) | masks.Global(tuple(positions))
