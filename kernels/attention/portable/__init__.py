"""Exact attention as Pallas kernels: FlashAttention on any pattern, compiled on a GPU and interpreted on a CPU.

What FlashAttention is (Dao et al. 2022, arXiv 2205.14135, "FA1"; Dao 2023, arXiv 2307.08691, "FA2"), and where it is here:

- Tiling (FA1, section 3.1). Scores are computed tile by tile in on-chip memory and never written out. FA1 (algorithm 1, line 1)
  derives the tile from the M elements that this memory holds, so that tiles of q, k, v and the output fit: B_c = ceil(M / 4d)
  keys by B_r = min(B_c, d) queries. Here it is a small table of measured or checked sizes, by head size and pass (`tiling`).
- Online softmax (FA1, algorithm 1, lines 10-13; Milakov & Gimelshein 2018): a running maximum m, normaliser l and output, which
  are rescaled when the maximum grows. FA2 (algorithm 1, lines 8-12) leaves the output unnormalised to the end, and keeps only
  the log-sum-exp of m and l (line 13); `forward` cites the lines.
- Recomputation (FA1, section 3.1, algorithm 4; FA2, algorithm 2): the backward pass forms the weights again from q, k and the
  log-sum-exp, so that what is kept is O(L), not O(L^2).
- Loop order (FA2, section 3.1-3.2): FA1 loops over keys outside and writes the output to memory once for each block of them; FA2
  loops over queries outside, which makes rows of tiles independent: they are the grid, and the output is written once.
- Input and output (FA1, theorem 2): Theta(L d + L^2) elements for standard attention, Theta(L^2 d^2 / M) for FA1, and
  (proposition 4) Theta(L d + L^2 d^2 s / M) where a fraction s of the tiles is visited; `kernels.attention.io_model` counts them.

Where we differ: tiles that the mask rules out are not visited and whole ones are not tested (`lists`), as in FlexAttention; the
backward pass is two kernels without atomics (`backward`), deterministic; scores may pass through a bias, whose arrays get
gradients; exponentials are of base e; a row without an allowed pair gives 0 and a log-sum-exp of -inf.
"""

from kernels.attention.portable.api import attend, visits, why_not
from kernels.attention.portable.tiling import Blocks

__all__ = ["Blocks", "attend", "visits", "why_not"]
