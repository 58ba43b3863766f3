"""Being asked to stop: SIGTERM and Ctrl-C are noted, and the loop stops after the step it is in."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Set by the first signal; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def note(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def watch() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest` for as long as the context lasts."""
    request = StopRequest()
    old = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
