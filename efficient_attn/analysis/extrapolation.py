"""Trained on L tokens, evaluated on up to 16 L: with the position method as trained, and with RoPE rescaled."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from efficient_attn import models
from efficient_attn.analysis.base import AnalysisError, Run, Table, doublings, scores

LONGEST = 16

Rotation = dict[str, Any]
SCALINGS: Mapping[str, Callable[[Rotation, float, int], Rotation]] = {
    "as trained": lambda rotation, factor, length: rotation,
    "linear (PI)": lambda rotation, factor, length: {**rotation, "name": "linear", "factor": factor},
    "NTK": lambda rotation, factor, length: {**rotation, "name": "ntk", "factor": factor},
    "YaRN": lambda rotation, factor, length: {**rotation, "name": "yarn", "factor": factor, "trained_length": length},
}
"""What rotary embeddings are changed to at a length of `factor` times the trained one, without fine-tuning."""


def extrapolation(run: Run) -> Table:
    """Loss on the same text in non-overlapping windows of L, 2 L, ... 16 L tokens (Press et al. 2022, section 2).

    A model with memory reads a window in segments of L; its memory starts empty with each window.
    """
    rows, notes, L = [], [f"Trained at {run.context} tokens. Non-overlapping windows; no fine-tuning."], run.context
    longest = max(n for n in doublings(L, LONGEST * L) if n < len(run.tokens))
    whole = (len(run.tokens) - 1) // longest * longest
    text = dataclasses.replace(run, tokens=run.tokens[: whole + 1])
    if longest < LONGEST * L:
        notes.append(f"Longer windows than {longest} need more text: give --tokens={LONGEST * L + 1} or more.")
    for name, change in SCALINGS.items():
        if name != "as trained" and not is_rotary(run.plan.config["model"]):
            continue
        for length in doublings(L, longest):
            config = with_rotation(run.plan.config["model"], lambda r, change=change, length=length: change(r, length / L, L))
            model = models.build(config, run.plan.task)
            try:
                losses = text.losses(text.windows(length), model)
            except ValueError as error:
                notes.append(f"{name}, {length}: {error}")
                break
            rows.append((name, length, length // L, losses.size, *scores(losses)))
    if not rows:
        raise AnalysisError(" ".join(notes))
    columns = ("positions", "length", "times trained", "tokens", "nats", "bits", "perplexity")
    return Table("Length extrapolation", columns, rows, ("length", ("nats",)), lines="positions", notes=tuple(notes))


def _mixers(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [model["mixer"]] if isinstance(model["mixer"], Mapping) else list(model["mixer"])


def is_rotary(model: Mapping[str, Any]) -> bool:
    """Whether every layer that has a rotation turns by plain RoPE."""
    return {mixer["rotation"]["name"] for mixer in _mixers(model) if "rotation" in mixer} == {"rotary"}


def with_rotation(model: Mapping[str, Any], change: Callable[[Rotation], Rotation]) -> dict[str, Any]:
    """The configuration of a model with other rotations, which have no parameters."""
    config = copy.deepcopy(dict(model))
    for mixer in _mixers(config):
        if "rotation" in mixer:
            mixer["rotation"] = change(mixer["rotation"])
    return config
