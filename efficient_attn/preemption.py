"""Being asked to stop: SIGTERM and Ctrl-C end a run after the step it is in, or at once while it has nothing to save."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was asked to stop, has saved what there was to save, and can be continued by the same command."""


class StopRequest:
    """Set by the first signal. Until `defer` is called it also interrupts at once; after that a second Ctrl-C does.

    A set request stays set: a `KeyboardInterrupt` that is raised inside a garbage collector's callback or a destructor is
    dropped by Python, and the run would go on as if nobody had asked.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_deferred = False

    def defer(self) -> None:
        """From now on there is something to save: the first signal only sets the request."""
        self.is_deferred = True

    def note(self, number: int, frame: object) -> None:
        at_once = not self.is_deferred or (self.signal is not None and number == signal.SIGINT)
        self.signal = signal.Signals(number)
        if at_once:
            raise KeyboardInterrupt

    def __bool__(self) -> bool:
        return self.signal is not None

    def reached(self) -> bool:
        """Whether to stop now. To be asked once after every step."""
        return bool(self)


class SharedStopRequest(StopRequest):
    """Of several processes, any of which may get the signal: all stop after the same step.

    `jax.distributed.initialize` has put its own handler in the place of SIGTERM's; Ctrl-C becomes a SIGTERM. JAX needs a
    number that rises from call to call; the steps of a run that rolls back do not, so it gets that of the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def note(self, number: int, frame: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        super().note(number, frame)

    def reached(self) -> bool:
        self.calls += 1
        if multihost_utils.reached_preemption_sync_point(self.calls):
            self.signal = signal.SIGTERM
        return self.signal is signal.SIGTERM


@contextlib.contextmanager
def watch() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest` for as long as the context lasts.

    Raises `Preempted` when a signal ends it before `defer` was called.
    """
    is_shared = jax.process_count() > 1
    request = SharedStopRequest() if is_shared else StopRequest()
    numbers = (signal.SIGINT,) if is_shared else (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    except KeyboardInterrupt:
        if not request or request.is_deferred:
            raise
        raise Preempted(f"stopped by {request.signal.name} before the first step; run again to continue") from None
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
