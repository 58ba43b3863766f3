"""Image Transformer's local attention, on the pixels of an image in raster order (Parmar et al. 2018, arXiv 1802.05751)."""

from efficient_attn.mixers.attention import Attention
from efficient_attn.mixers.local import Bounded
from kernels.attention import masks


class ImageLocal1D(Bounded):
    """1D local attention (section 3.3): a block of consecutive pixels sees itself and the pixels before the block.

    The paper's decoder is the causal form with these sizes; the bidirectional form looks ahead to the end of the block only.

    query_block: l_q, pixels of a block. memory: l_m, pixels before it that are seen.
    """

    query_block: int = 256
    memory: int = 512

    shift_invariant = False

    @property
    def lookback(self) -> int:
        return self.query_block - 1 + self.memory

    def pattern(self, length: int) -> masks.Mask:
        return masks.Local1D(self.query_block, self.memory)


class ImageLocal2D(Attention):
    """2D local attention (section 3.3): a rectangle of pixels sees itself, rows above it, and columns on either side.

    The paper generates one rectangle after the other; the causal form here keeps raster order, so a pixel sees those of its
    own and the surrounding rectangle that raster order puts before it.

    width: of the image, in pixels; its height follows from the length, which must be whole rows.
    query_height, query_width: the rectangles (the paper's are 8 x 32).
    memory_height, memory_width: rows above, and columns on either side.
    """

    width: int = 32
    query_height: int = 8
    query_width: int = 32
    memory_height: int = 16
    memory_width: int = 0

    shift_invariant = False

    def pattern(self, length: int) -> masks.Mask:
        if length % self.width:
            raise ValueError(
                f"image_local_2d: {length} positions are not whole rows of width={self.width}; set the image's width, and "
                "pooling to 'mean' or 'last' where 'cls' puts a vector before the pixels"
            )
        sizes = (self.query_height, self.query_width, self.memory_height, self.memory_width)
        return masks.Local2D(length // self.width, self.width, *sizes)
