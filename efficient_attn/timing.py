"""What the loop measures of itself: profiler traces, steps and tokens a second, time spent waiting for input."""

import contextlib
import pathlib
import time

import jax


class Profiler:
    """Traces `steps` steps, from the tenth after the start on (the first ones compile), or from the second of a short run.

    Python frames are not traced: the tracer follows every thread, those of the reader and of Orbax too, and was seen to crash
    the process as it collected them (jaxlib 0.10.2); what XLA and the device do is all there.
    """

    def __init__(self, folder: pathlib.Path, steps: int, start: int, total: int):
        self.folder, self.steps = folder, steps
        self.first = start + (10 if start + 10 + steps <= total else 1)
        self.traced: int | None = None  # steps traced so far, while tracing

    def at(self, step: int) -> None:
        """To be called before step + 1 is dispatched."""
        if self.traced is not None:
            self.traced += 1
            if self.traced == self.steps:
                self.close()
        elif self.steps and step == self.first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self.traced = 0

    def close(self) -> None:
        if self.traced is not None:
            jax.profiler.stop_trace()
            print(f"profile of {self.traced} step(s) written to {self.folder}", flush=True)
            self.traced, self.steps = None, 0


class Clock:
    """Steps and tokens a second, and seconds a step spent waiting for input, between two lines of metrics.

    Counts the steps that were dispatched in between. Evaluating and starting a save do not count.
    """

    def __init__(self, tokens_per_batch: int):
        self.tokens = tokens_per_batch
        self.compiled = False
        self.start()

    def start(self) -> None:
        self.began, self.waited, self.excluded, self.dispatched = time.perf_counter(), 0.0, 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Rates since the previous lap; none the first time, which includes compilation, and none without a new step."""
        seconds, steps, waited = time.perf_counter() - self.began - self.excluded, self.dispatched, self.waited
        if not steps:
            return {}
        self.start()
        if not self.compiled:
            self.compiled = True
            return {}
        rate = steps / seconds
        return {"steps_per_second": rate, "tokens_per_second": rate * self.tokens, "input_wait": waited / steps}
