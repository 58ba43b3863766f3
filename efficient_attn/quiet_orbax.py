"""Orbax's reports of a save that failed, beside the one that the run itself gives."""

import functools
import logging
import sys


def let_it_fail_quietly() -> None:
    """Have a failed save reported once, by the `CheckpointError` that `Checkpoints.wait` raises.

    Orbax also logs it three times and closes its event loop at the first array that fails: each write still under way
    complains of that to the log of `asyncio` or to `sys.unraisablehook`. Only these reports are dropped.
    """
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_is_not_of_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _report_unraisable:
        sys.unraisablehook = functools.partial(_report_unraisable, sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


def _report_unraisable(report, unraisable) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        report(unraisable)
