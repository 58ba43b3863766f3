"""Steps that are not finite, or whose gradient is far larger than those before: which those are, and how many there may be.

`config.train.on_divergence` decides: "stop" ends the run; "skip" leaves the state as it was, inside the jitted step, and
goes on with the next batch; "rollback" returns to the last whole checkpoint, leaves out the batches from there to the bad
step, and goes on with another key. All of it is a function of what a checkpoint holds, so a resumed run takes the same way.

A validation that is not finite ends the run, or rolls it back, like a step; it has none that could be left out, so under "skip"
the run goes on, and that validation is never the best.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.metrics import Sums, first_non_finite

POLICIES: Mapping[str, str] = {
    "stop": "end the run; its last checkpoint is intact",
    "skip": "keep the state as it was before the step",
    "rollback": "return to the last checkpoint and leave out the batches since",
}
HISTORY = 64
"""Steps whose gradient norms the running median is of; it is not used before there are a quarter as many."""


class TrainingDiverged(Exception):
    """A loss, gradient or parameter is infinite or not a number, or the gradient norm has jumped."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def check(policy: str, spike_factor: float, replicas: int) -> None:
    """Raise `ConfigError` for a policy there is none of, a factor that every other step would exceed, or several replicas."""
    lookup(POLICIES, policy, "train.on_divergence")
    if 0 < spike_factor <= 1:
        raise ConfigError(f"train.spike_factor={spike_factor:g} must be more than 1 times the median, or 0 for no such check")
    if replicas > 1 and (policy != "stop" or spike_factor):
        raise ConfigError(
            f"train.on_divergence={policy!r} and train.spike_factor={spike_factor:g} need train.replicas=1; it is {replicas}"
        )


def advice(policy: str, replicas: int, clip_norm: float, has_memory: bool) -> str:
    """What may help a run that has diverged, of what is not chosen yet and may be."""
    ways = ["lower optimizer.learning_rate", "lower optimizer.clip_norm" if clip_norm else "clip gradients (optimizer.clip_norm)"]
    ways += ["lengthen optimizer.warmup"]
    if policy != "stop":
        ways += ["raise train.max_divergences"]
    others = {"skip", "rollback"} - {policy} - ({"rollback"} if has_memory else set())
    if others and replicas == 1:
        ways += [f"set train.on_divergence to {' or '.join(map(repr, sorted(others)))}"]
    text = f"{', '.join(ways[:-1])}, or {ways[-1]}"
    return text[0].upper() + text[1:]


@dataclasses.dataclass
class Guard:
    """What the loop remembers of divergence; saved with each checkpoint.

    norms: [step, gradient norm] of the last steps taken. skipped, rollbacks: how many there were in this run.
    batch_offset: step t (from 1) reads batch t - 1 + batch_offset.
    """

    norms: list = dataclasses.field(default_factory=list)
    skipped: int = 0
    rollbacks: int = 0
    batch_offset: int = 0

    def limit(self, step: int, spike_factor: float) -> float:
        """The gradient norm that `step` must stay below: `spike_factor` times the median of the steps up to step - 2.

        (The loop knows no later one when it starts the step, and a resumed run, which knows more, must decide alike.)
        Infinite where `spike_factor` is 0 or too few steps are known.
        """
        known = [norm for at, norm in self.norms if at <= step - 2][-HISTORY:]
        if not spike_factor or 4 * len(known) < HISTORY:
            return math.inf
        return float(np.float32(spike_factor * statistics.median(known)))  # as the device compares

    def note(self, step: int, sums: Sums, spike_factor: float, most: int) -> str:
        """Take in the sums of a step; what is wrong with it, or nothing. Up to `most` skipped steps are counted, not wrong."""
        if sums.get("skipped", (0.0, 0.0))[0]:
            self.skipped += 1
            return (
                f"{self.skipped} steps were skipped up to step {step} (train.max_divergences={most})"
                if self.skipped > most
                else ""
            )
        if (bad := first_non_finite(sums)) is not None:
            return f"{bad} is not finite at step {step}"
        if not spike_factor:
            return ""
        norm, limit = float(sums["grad_norm"][0]), self.limit(step, spike_factor)
        if not norm < limit:
            return f"grad_norm={norm:.4g} at step {step} is over {spike_factor:g} times the median ({limit / spike_factor:.4g})"
        self.norms = [*self.norms, [step, norm]][-HISTORY - 1 :]
        return ""

    def rolled_back(self, restored: "Guard", start: int, step: int) -> "Guard":
        """The guard after `step` went wrong and the loop returned to `start`, whose guard was `restored`."""
        offset = self.batch_offset + step - start  # the next batch is the one after that of `step`
        return dataclasses.replace(restored, rollbacks=self.rollbacks + 1, batch_offset=offset)

    def counts(self) -> dict[str, int]:
        """The counts that are not zero, for a line of metrics."""
        return {name: count for name in ("skipped", "rollbacks") if (count := getattr(self, name))}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
