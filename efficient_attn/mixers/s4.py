"""S4: a diagonal plus low-rank state-space model for each channel (Gu, Goel & Ré 2022, arXiv 2111.00396)."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import numpy as np

from efficient_attn.mixers.ssm.hippo import dplr
from efficient_attn.mixers.ssm.paired import PairedStateSpace
from efficient_attn.mixers.ssm.systems import LowRank


def _rank_one(measure: str, N: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lambda, P and B [N/2] of a measure whose correction P has rank one."""
    Lambda, P, B, _ = dplr(measure, N)
    return Lambda, P[0], B


INITS: Mapping[str, Callable] = {measure: functools.partial(_rank_one, measure) for measure in ("legs", "lagt", "fourier")}
"""Lambda, P and B by measure: S4-LegS, and S4-FouT of Gu et al. 2023. LegT, whose correction has rank two, is not among them."""


class S4(PairedStateSpace):
    """x' = (Lambda - P P*) x + B u, y = C x + D u for each channel, discretised by the bilinear transform.

    A_init: one of `INITS`.

    See `PairedStateSpace` and `FeatureStateSpace` for the other fields. As in the released code since its second version, one P
    serves as the paper's P and Q, which keeps A stable (Goel et al. 2022, section 4.2). Unlike there, C is trained, not the C~
    of one sequence length: a layer has no length, and decodes with the C it has. B starts from HiPPO's without being clipped.
    """

    A_init: str = "legs"

    @nn.compact
    def systems(self, width: int) -> tuple[LowRank, ...]:
        Lambda, P, B = self.initial(INITS, self.A_init)
        Lambda, P, B = self.state_parameters(width, Lambda=Lambda, P=P, B=B)
        Delta = self.steps(width)
        return tuple(LowRank(Lambda, P, B, C, Delta) for C in self.readouts(width))
