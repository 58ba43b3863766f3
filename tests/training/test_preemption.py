"""Signals: at once while there is nothing to save, after the step later on, and never forgotten."""

import gc
import os
import signal

import pytest

from efficient_attn import preemption


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    for _ in range(100):  # the interpreter handles a signal between two instructions
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_something_to_save_a_signal_ends_at_once(number):
    message = f"stopped by {number.name} before the first step; run again"
    with pytest.raises(preemption.Preempted, match=message), preemption.watch():
        send(number)
        pytest.fail("went on")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_remembered():
    def dropped(phase, info):
        if phase == "start":
            send(signal.SIGINT)

    with preemption.watch() as stop:
        gc.callbacks.append(dropped)
        try:
            gc.collect()  # Python reports the KeyboardInterrupt as ignored
        finally:
            gc.callbacks.remove(dropped)
        assert stop.signal == signal.SIGINT


def test_later_the_first_signal_waits_for_the_step_and_a_second_ctrl_c_does_not():
    with pytest.raises(KeyboardInterrupt), preemption.watch() as stop:
        stop.defer()
        assert not stop
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        send(signal.SIGINT)
        pytest.fail("went on")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_several_processes_count_the_calls_and_not_the_steps_which_may_fall(monkeypatch):
    asked = []
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 4)
    request = preemption.SharedStopRequest()
    assert [request.reached() for _ in range(4)] == [False, False, False, True]
    assert asked == [1, 2, 3, 4] and request.signal == signal.SIGTERM
