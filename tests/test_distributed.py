"""Several processes: a step that fails because one is lost is told in a line. (python -m tests.faults kills one of two.)"""

import jax
import pytest

from efficient_attn import distributed


def fail():
    with distributed.together():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed:\n  Connection reset by peer")


def fail_in_a_save():
    with distributed.together():
        try:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Barrier failed: stopped sending heartbeats")
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError("Timed out while waiting for a barrier") from error  # as Orbax does


def fill_the_disk():
    with distributed.together():
        raise OSError("No space left on device")


def test_what_fails_in_one_of_several_processes_is_told_as_a_lost_one(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError):
        fail()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(distributed.PeerLost, match=r"^process 0 of 2 cannot go on .* failed: Connection reset by peer\)\. If"):
        fail()
    with pytest.raises(distributed.PeerLost, match=r"^process 0 of 2 cannot go on .* stopped sending heartbeats\)\. If"):
        fail_in_a_save()
    with pytest.raises(OSError, match="No space left"):
        fill_the_disk()
