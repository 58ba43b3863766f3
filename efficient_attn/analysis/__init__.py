"""What a trained language model does with its context: `python eval.py --workdir=RUN --analysis=NAME`."""

from collections.abc import Callable, Mapping

from efficient_attn.analysis.attention import attention
from efficient_attn.analysis.base import Run, Table, load, over_seeds
from efficient_attn.analysis.extrapolation import extrapolation
from efficient_attn.analysis.fine_tuning import fine_tuning
from efficient_attn.analysis.perturbation import perturbation
from efficient_attn.analysis.positions import positions
from efficient_attn.analysis.receptive_field import receptive_field
from efficient_attn.analysis.windows import windows

__all__ = ["ANALYSES", "Run", "Table", "load", "over_seeds"]

ANALYSES: Mapping[str, Callable[[Run], Table]] = {
    "windows": windows,
    "positions": positions,
    "extrapolation": extrapolation,
    "fine_tuning": fine_tuning,
    "perturbation": perturbation,
    "receptive_field": receptive_field,
    "attention": attention,
}
"""By the name that --analysis uses. One that a run does not allow raises `AnalysisError` with the reason."""
