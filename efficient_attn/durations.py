"""Durations in steps, epochs or examples: '5000 steps', '40 epochs', '2e6 examples'."""

import fractions
import math
import re

from efficient_attn.arguments import ConfigError

_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d{1,2})?)\s*(step|epoch|example)s?\s*")


def in_steps(duration: object, *, batch_size: int, num_examples: int, field: str) -> int:
    """The number of train steps in `duration`, rounded up; an epoch is `num_examples` examples.

    Raises `ConfigError`, naming `field`, for anything else than a number and one of the three units.
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if not match:
        raise ConfigError(f"{field}={duration!r} is no duration; write e.g. '5000 steps', '40 epochs' or '2e6 examples'")
    amount, unit = fractions.Fraction(match[1].rstrip(".")), match[2]
    examples_each = {"step": batch_size, "epoch": num_examples, "example": 1}[unit]
    return math.ceil(amount * examples_each / batch_size)
