"""Several processes: a step that fails because one is lost is told in a line. (python -m tests.faults kills one of two.)"""

import jax
import pytest

from efficient_attn import distributed


def fail():
    with distributed.together():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed:\n  Connection reset by peer")


def test_what_fails_in_one_of_several_processes_is_told_as_a_lost_one(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError):
        fail()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(distributed.PeerLost, match=r"^process 0 of 2 cannot go on .* failed: Connection reset by peer\)\. If"):
        fail()
