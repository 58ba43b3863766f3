"""choose: by name or by preference, with reasons, and never by trying."""

import pytest

from kernels.dispatch import Implementation, choose

TABLE = {
    "fast": Implementation(len, lambda spec: "it is too long" if spec > 3 else None, "quick"),
    "slow": Implementation(len, lambda spec: None, "steady"),
    "baseline": Implementation(len, lambda spec: None, "someone else's"),
}
PREFERENCE = ("fast", "slow")


def test_the_first_that_can_is_taken():
    assert choose("op", TABLE, PREFERENCE, 3, None).name == "fast"
    choice = choose("op", TABLE, PREFERENCE, 4, None)
    assert choice.name == "slow"
    assert choice.others == {"fast": "cannot: it is too long", "baseline": "can, but runs only when asked for by name"}
    assert str(choice).splitlines()[0].startswith("slow: the first of")


def test_what_is_passed_over_is_logged_once(caplog):
    with caplog.at_level("INFO", logger="kernels.dispatch"):
        for _ in range(2):
            choose("an op", TABLE, PREFERENCE, 4, None, told=("fast",))
        choose("an op", TABLE, PREFERENCE, 3, None, told=("fast",))
        choose("an op", TABLE, PREFERENCE, 5, None)
    assert caplog.messages == ["an op: slow, not fast: it is too long"]


def test_a_name_is_obeyed_or_refused_with_the_reason():
    assert choose("op", TABLE, PREFERENCE, 4, "baseline").name == "baseline"
    with pytest.raises(
        ValueError, match=r"op: implementation='fast' cannot run this call: it is too long; able: \['baseline', 'slow'\]"
    ):
        choose("op", TABLE, PREFERENCE, 4, "fast")
    with pytest.raises(ValueError, match=r"'quick' does not exist; use one of \['baseline', 'fast', 'slow'\]"):
        choose("op", TABLE, PREFERENCE, 4, "quick")


def test_nothing_preferred_that_can_is_an_error():
    with pytest.raises(ValueError, match=r"none of \['fast'\] can run this call.*by name: \['baseline', 'slow'\]"):
        choose("op", TABLE, ("fast",), 4, None)
