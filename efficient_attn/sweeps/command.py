"""What sweep.py does: from a file with a function `sweep(scale)` to finished runs, and what there is to say about them."""

import contextlib
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efficient_attn import preemption, workdir
from efficient_attn.arguments import ConfigError, lookup
from efficient_attn.preemption import Preempted
from efficient_attn.sweeps import slots
from efficient_attn.sweeps.jobs import Job, State
from efficient_attn.sweeps.ledger import Ledger, Record
from efficient_attn.sweeps.local import Local
from efficient_attn.sweeps.scheduler import Launcher, Scheduler
from efficient_attn.sweeps.slurm import Slurm, parse_parameters
from efficient_attn.sweeps.view import View, counts
from efficient_attn.tables import ROOT, Cell, default_root, load_module


def _local(root: pathlib.Path, jobs: int | None, parameters: Sequence[str]) -> Local:
    if parameters:
        raise ConfigError("--slurm goes with --launcher=slurm")
    gpus = slots.available_gpus()
    return Local(root, slots.divide(jobs or max(1, len(gpus)), slots.available_cores(), gpus))


def _slurm(root: pathlib.Path, jobs: int | None, parameters: Sequence[str]) -> Slurm:
    return Slurm(root.resolve(), parse_parameters(parameters), jobs)


LAUNCHERS: Mapping[str, Callable[[pathlib.Path, int | None, Sequence[str]], Launcher]] = {"local": _local, "slurm": _slurm}
"""By name: from the root, how many runs at once, and Slurm's parameters."""


def load_jobs(path: pathlib.Path, scale: str, root: pathlib.Path | None = None) -> tuple[pathlib.Path, list[Job]]:
    """The runs' folder, by default `tables.default_root`, and those that `sweep(scale)` yields, every configuration checked.

    Raises `ConfigError`, naming the cell, for whatever is wrong with the file, a cell, or its configuration.
    """
    try:
        module = load_module(path)
        scales = getattr(module, "SCALES", {scale: ""})
        lookup(scales, scale, f"scale of {path}")
        cells = list(getattr(module, "sweep", None)(scale)) if callable(getattr(module, "sweep", None)) else None
    except ConfigError:
        raise
    except Exception as error:  # whatever the file may raise, said in a line
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(f"{path}: {type(error).__name__} at {last.filename} line {last.lineno}: {error}") from error
    if cells is None:
        raise ConfigError(f"{path} has no function sweep(scale) that yields cells (efficient_attn.tables.Cell)")
    if not cells:
        measured_by = getattr(module, "MEASURED_BY", "")
        raise ConfigError(
            f"{path} has no runs of scale {scale!r}" + (f"; its figures come from: {measured_by}" if measured_by else "")
        )
    root = root or default_root(path, module)
    base = root if pathlib.Path.cwd() == ROOT else root.resolve()  # commands run in the checkout
    jobs = [_job(cell, path, base) for cell in cells]
    folders: dict[pathlib.Path, Job] = {}
    for job in jobs:
        if job.folder in folders:
            raise ConfigError(f"{path}: two cells would share the folder {job.folder}; tell them apart by `choice`")
        folders[job.folder] = job
    return root, jobs


def _job(cell: Any, path: pathlib.Path, root: pathlib.Path) -> Job:
    if not isinstance(cell, Cell):
        raise ConfigError(f"{path}: sweep(scale) must yield cells (efficient_attn.tables.Cell), got {cell!r}")
    title = " ".join(filter(None, [cell.row, cell.column, cell.choice, f"s{cell.seed}"]))
    try:
        cell.get_config()
    except ConfigError as error:
        raise ConfigError(f"{path}, the cell {title!r}: {error}") from error
    folder = cell.workdir(root)
    return Job(str(folder.relative_to(root)), title, folder, tuple(map(tuple, cell.commands(root))))


def run(
    jobs: Sequence[Job], root: pathlib.Path, launcher: Launcher, *, about: dict[str, Any], retries: int, retry_failed: bool
) -> bool:
    """Run every job that is not finished, print what has become of all, and tell whether every one is done.

    Raises:
      WorkdirError: another sweep works on `root`, or it cannot be written.
      Preempted: on SIGTERM or Ctrl-C, after the runs here have saved; those of Slurm go on.
    """
    with lock(root), preemption.watch() as stop:
        stop.defer()
        ledger = Ledger(root, about)
        left = []
        for job in jobs:
            state = ledger.enter(job)
            if state != State.DONE and (state != State.FAILED or retry_failed):
                left.append(job)
        records = {job.name: ledger.records[job.name] for job in jobs}
        print(f"{len(jobs)} runs in {root}: {counts(records.values())}; {len(left)} to run", flush=True)
        with View(jobs) as view, launcher:
            Scheduler(launcher, ledger, view, retries).run(left, lambda: bool(stop))
        records = {job.name: ledger.records[job.name] for job in jobs}
        print(summary(records))
        if stop:
            raise Preempted(f"stopped by {stop.signal.name}; {launcher.AFTER_STOP}; the same command continues")
        return all(record.state == State.DONE for record in records.values())


def lock(root: pathlib.Path) -> contextlib.AbstractContextManager:
    """The lock of the whole sweep. Raises `WorkdirBusy` where another sweep has it."""
    try:
        return workdir.lock(root)
    except workdir.WorkdirBusy as error:
        raise workdir.WorkdirBusy(
            f"another sweep works on {root} ({workdir.holder(root)}); let it end, or choose another --root"
        ) from error


def summary(records: Mapping[str, Record]) -> str:
    """The counts; of every failed run the reason, its log, and the command to run it by hand."""
    lines = [counts(records.values())]
    for record in records.values():
        if record.state == State.FAILED:
            lines += [f"failed: {record.title}", f"  why   {record.reason}", f"  log   {record.log}", f"  again {record.command}"]
    return "\n".join(lines)


def dry_run(jobs: Sequence[Job], root: pathlib.Path, launcher: Launcher, *, retry_failed: bool) -> str:
    """How and what would be run, one line of shell a run; nothing is started or written."""
    ledger = Ledger(root, {})
    lines = [f"# {launcher.describe()}"]
    for job in jobs:
        state = ledger.state(job)
        skipped = state == State.DONE or (state == State.FAILED and not retry_failed)
        lines.append(f"# {state}: {job.title}" if skipped else job.paste())
    return "\n".join(lines)
