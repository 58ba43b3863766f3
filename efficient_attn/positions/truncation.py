"""RoPE with one scale for near keys and another for far ones: two attentions over disjoint keys, merged by log-sum-exp."""

import dataclasses
from typing import Any

from jaxtyping import Array, Num

from efficient_attn.positions.base import EVERY_PAIR, Places
from efficient_attn.positions.rotary import Rotary, require
from kernels.attention import masks, merge

FarPositions = tuple[Num[Array, "_ L"], Num[Array, "_ S"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReRoPE(Rotary):
    """Distances beyond the window count as w: min(i - j, w) (ReRoPE; Su 2023, bojone/rerope).

    window: w, in tokens. Keys less than w tokens away are seen through RoPE; farther ones through the query turned by w and the
    key not turned. Later keys that far away (bidirectional attention) count as -w. Up to w tokens, the same as RoPE.
    """

    window: int

    is_plain = False

    def __post_init__(self):
        super().__post_init__()
        require(self, "window", self.window >= 1, "a window of at least 1")

    def far(self, q: Num[Array, "_ L"], kv: Num[Array, "_ S"], sign: int) -> FarPositions:
        """Positions for far keys, before the query (sign 1) or after it (-1)."""
        return 0 * q + sign * self.window, 0 * kv

    def attend(
        self, function, places: Places, q, k, v, *, mask: masks.Mask = EVERY_PAIR, return_lse: bool = False, **options
    ) -> Any:  # fmt: skip
        def part(q_positions, kv_positions, where: masks.Mask):
            turned = self.rotate(q, q_positions, places.q_length), self.rotate(k, kv_positions, places.kv_length)
            return function(*turned, v, mask=mask & where, return_lse=True, **options)

        window = masks.Window(self.window)
        parts = [part(places.q, places.kv, window)]
        if k.shape[1] > self.window:
            parts.append(part(*self.far(places.q, places.kv, 1), masks.Causal() & ~window))
            if not places.causal:
                parts.append(part(*self.far(places.q, places.kv, -1), ~masks.Causal() & ~window))
        out, lse = merge(parts)
        return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeakyReRoPE(ReRoPE):
    """Distances beyond the window grow `factor` = kappa times more slowly: min(i - j, w + (i - j - w) / kappa) (Su 2023)."""

    factor: float

    def __post_init__(self):
        super().__post_init__()
        require(self, "factor", self.factor >= 1, "a factor of at least 1")

    def far(self, q, kv, sign):
        return q / self.factor + sign * self.window * (1 - 1 / self.factor), kv / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfExtend(ReRoPE):
    """Far keys are seen in groups of `group` = G positions: floor(i/G) - floor(j/G) + w - floor(w/G).

    Self-Extend of LongLM (Jin et al. 2024, arXiv 2401.01325, section 3.2 and algorithm 1): no training, (L - w) G + w tokens from
    a model trained on L. The same as RoPE where G = 1.
    """

    group: int

    def __post_init__(self):
        super().__post_init__()
        require(self, "group", self.group >= 1, "a group of at least 1 position")

    def far(self, q, kv, sign):
        return q // self.group + sign * (self.window - self.window // self.group), kv // self.group
