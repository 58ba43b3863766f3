"""Durations in steps, epochs and examples."""

import pytest

from efficient_attn.arguments import ConfigError
from efficient_attn.durations import in_steps


@pytest.mark.parametrize(
    "text, steps",
    [
        ("7 steps", 7),
        ("1 step", 1),
        ("2 epochs", 20),
        ("0.5 epoch", 5),
        ("1e3 examples", 100),
        ("95 examples", 10),
        ("0 steps", 0),
    ],
)
def test_units(text, steps):
    assert in_steps(text, batch_size=10, num_examples=100, field="f") == steps


def test_an_epoch_that_is_no_multiple_rounds_up():
    assert in_steps("1 epochs", batch_size=32, num_examples=100, field="f") == 4


@pytest.mark.parametrize("text", ["5000", "ten steps", "5 stepss", "-1 steps", "", 5])
def test_anything_else_is_an_error(text):
    with pytest.raises(ConfigError, match=r"train.duration=.* is no duration; write e.g. '5000 steps'"):
        in_steps(text, batch_size=1, num_examples=1, field="train.duration")
