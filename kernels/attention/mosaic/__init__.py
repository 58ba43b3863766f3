"""Exact attention for Hopper: FlashAttention-3's warp specialisation in Pallas Mosaic GPU, forward and backward, on patterns.

What `kernels.attention.portable` does, on the hardware's own terms: tiles come by TMA into a ring of shared memory, filled by
one warpgroup and read by others (`program`); products are wgmma's, with weights that never leave registers (`machine`); the
softmax is in base 2, and scores are computed a tile ahead of it (`forward`; Shah et al. 2024).
Masks, their block tables and the dispatch are those of the portable kernels: tiles that a mask rules out are not visited, whole
ones are not tested; where a kernel cannot evaluate the mask, the allowed pairs of a tile come with it, a byte each. Positions may
be traced, so that a ring of devices may use the kernels. ALiBi is a rule in the kernel, no memory traffic; dense tables and rules
that add by distance alone (T5, KERPLE, Sandwich, one's own) are read a tile at a time (`operands`). The backward pass is two
kernels without atomics, deterministic (`backward`), and a third for what such a bias learns (`table`).

Few queries against many keys, which is all reading, have a kernel of their own (`decode`), with keys in a row or in blocks.

What it lacks `why_not` names. Numerics are checked in JAX's interpreter of these kernels on a CPU, with all barriers and copies,
and on a card by `python -m benchmarks.attention_numerics`; each entry of the block table compiles for an H200 without spills
(`python -m kernels.offline --op=mosaic --compile`). What was measured on an H100: docs/gpu.md.
"""

from kernels.attention.mosaic.api import attend, why_not
from kernels.attention.mosaic.tiling import Blocks

__all__ = ["Blocks", "attend", "why_not"]
