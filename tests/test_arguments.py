"""Constructor arguments as dicts: lookups, checks and their messages."""

import pytest

from efficient_attn.arguments import ConfigError, arguments_of, check_arguments, is_optional, lookup
from efficient_attn.mixers import Attention
from efficient_attn.optim import OptimizerConfig


def test_lookup_names_the_table_and_the_nearest():
    assert lookup({"a": 1}, "a", "field") == 1
    with pytest.raises(ConfigError, match=r"task\.name='listop' is unknown \(did you mean 'listops'\?\); one of: listops, text"):
        lookup({"text": 0, "listops": 1}, "listop", "task.name")
    with pytest.raises(ConfigError, match=r"task\.name=None"):
        lookup({"text": 0}, None, "task.name")


def test_unknown_and_missing_arguments_are_errors():
    with pytest.raises(ConfigError, match=r"optimizer has no argument 'learnin_rate' \(did you mean 'learning_rate'\?\)"):
        check_arguments(OptimizerConfig, {"learnin_rate": 1.0}, "optimizer")

    def needs(a, b, c=1):
        return a, b, c

    with pytest.raises(ConfigError, match="x needs b"):
        check_arguments(needs, {"a": 1}, "x")


def test_injected_arguments_cannot_be_configured():
    known = arguments_of(Attention)
    assert "num_heads" in known and not {"dtype", "parent", "name", "function"} & known.keys()
    assert known["num_kv_heads"].default is None and is_optional(known["num_kv_heads"].type) is int
    assert is_optional(int) is None


def test_every_number_of_several_is_checked():
    def layer(basis_widths=(0.1,), dilation=1):
        return basis_widths, dilation

    check_arguments(layer, {"basis_widths": (0.1, 0.2), "dilation": (1, 2)}, "x")
    with pytest.raises(ConfigError, match=r"x\.basis_widths=0\.0 must be more than 0"):
        check_arguments(layer, {"basis_widths": (0.1, 0.0)}, "x")
    with pytest.raises(ConfigError, match=r"x\.dilation=0 must be at least 1"):
        check_arguments(layer, {"dilation": [2, 0]}, "x")
