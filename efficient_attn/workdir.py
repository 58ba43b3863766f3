"""The folder of one run: its lock, its JSON files, its metrics, and the record of what the run was made with.

Everything written here is plain JSON that any tool reads. JSON has no NaN and no infinity, so a non-finite number is stored
as `null` (which pandas reads back as NaN). Files are replaced atomically: written aside, synced, renamed.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tensorflow-datasets")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
JAX_CONFIG = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
VECTOR_EXTENSIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
NOT_NUMERIC = ("argv", "os", "versions.orbax-checkpoint")  # recorded, but results do not depend on them

_locks: dict[pathlib.Path, Any] = {}  # open lock files; closing one would release its lock


class WorkdirError(Exception):
    """The run's folder is in use, damaged or not writable. The message says what is wrong and what to do."""


class WorkdirBusy(WorkdirError):
    """Another process works in the folder."""


def lock(workdir: pathlib.Path) -> contextlib.ExitStack:
    """Take the exclusive lock of `workdir` (made if missing), held until this process ends, however it ends.

    A POSIX record lock on `workdir/.lock`: the kernel releases it on `kill -9`, and worker processes that were forked do
    not keep it alive. Of a run with several JAX processes only process 0 may call this. The lock is held from the call
    on; the result, used as `with lock(workdir):` or closed, releases it early.

    Raises:
      WorkdirBusy: another run holds it (named by pid and host).
      WorkdirError: the folder cannot be written.
    """
    path = workdir.resolve() / ".lock"
    if path in _locks:
        raise WorkdirBusy(f"{workdir} is in use by another run of this process (pid {os.getpid()}). Let that one end first.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock is held)
    except OSError as error:
        raise WorkdirError(f"cannot write in {workdir}: {error.strerror}. Choose another --workdir.") from error
    try:
        _lock_file(file)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise WorkdirError(
                f"cannot lock {path}: {error.strerror}. Choose a --workdir on a file system with locks."
            ) from error
        message = f"{workdir} is in use by another run ({holder}). Wait for it, stop it, or choose another --workdir."
        raise WorkdirBusy(message) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locks[path] = file
    release = contextlib.ExitStack()
    release.callback(lambda: _locks.pop(path).close())
    return release


def _lock_file(file: TextIO) -> None:
    """Lock it for this process alone. A moment is given to `holder` of another process, which may be looking just now."""
    for pause in (0.05, 0.1, None):
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            if pause is None:
                raise
            time.sleep(pause)


def holder(workdir: pathlib.Path) -> str | None:
    """Who holds the lock of `workdir`, as "pid 12 on host"; None while it is free. Any number of processes may look at once."""
    path = workdir.resolve() / ".lock"
    if path in _locks:  # and to open and close it again would release it
        return f"pid {os.getpid()}, this process"
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 (its end releases the lock)
    except OSError:  # nobody has been there, or may
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return file.read().strip() or "unknown"
    return None


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: scalar arrays as numbers, tuples as lists, non-finite floats as None.

    Raises:
      TypeError: for anything JSON cannot hold, and for keys that are not strings.
    """
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = value.item()  # a ValueError for more than one element
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"JSON keys must be strings, got {bad[0]!r}.")
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r}.")


def _write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader, or a kill at any moment, finds the old file or the new one, whole."""
    aside = path.with_name(f".{path.name}.tmp")  # a fixed name, so that what a kill left is overwritten, not collected
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a read-only file system there is nothing to remove, and removing fails
            aside.unlink(missing_ok=True)
        raise WorkdirError(f"cannot write {path}: {error.strerror}. What it held before is intact.") from error


def write_json(path: pathlib.Path, obj: Any) -> None:
    """Write `jsonable(obj)` to `path` atomically. Raises `WorkdirError` (disk full, read-only) leaving the old file as it was."""
    _write_atomically(path, (json.dumps(jsonable(obj), indent=1, allow_nan=False) + "\n").encode())


def write_text(path: pathlib.Path, text: str) -> None:
    """Write `text` to `path` atomically, its folder too where that is missing. Raises `WorkdirError` as `write_json` does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"cannot make the folder {path.parent}: {error.strerror}.") from error
    _write_atomically(path, text.encode())


def read_json(path: pathlib.Path) -> Any:
    """What `write_json` wrote. Raises `FileNotFoundError`, or `WorkdirError` where the file is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise WorkdirError(f"{path} is not JSON ({error}): it was edited or damaged. Restore it or move it away.") from error


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, each with an integer `step` larger than that of the line before.

    Opening it reads and changes nothing; a file that does not exist is an empty one. One process appends.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file = None
        self._last: int | None = None  # the last step in the file, known once it is open

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line, whole or not at all.

        Raises:
          WorkdirError: `step` is missing or not larger than the last one, or the disk is full.
        """
        if self._file is None:
            self._open()
        row = jsonable(row)
        self._last, previous = _next_step(row, self._last, str(self.path)), self._last
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            self._last = previous
            raise WorkdirError(f"cannot write {self.path}: {error.strerror}. What it held before is intact.") from error

    def read(self) -> list[dict[str, Any]]:
        """All rows. A last line without its newline (torn by a kill, or being written right now) is left out.

        Raises:
          WorkdirError: a line is not a JSON object or its step does not increase; names the line.
        """
        last, rows = None, []
        for number, line in enumerate(self._whole_lines(), start=1):
            where = f"{self.path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise WorkdirError(f"{where} is not JSON ({error}). Remove that line and run again.") from error
            last = _next_step(row, last, where)
            rows.append(row)
        return rows

    def truncate(self, step: int) -> int:
        """Drop, atomically, the lines whose step is larger than `step` and a torn last line; returns how many."""
        rows = self.read()
        lines = self._whole_lines()
        kept = [line for row, line in zip(rows, lines, strict=True) if row["step"] <= step]
        torn = self._size() > sum(map(len, lines))
        dropped = len(lines) - len(kept) + torn
        if dropped:
            self.close()
            _write_atomically(self.path, b"".join(kept))
            logging.warning("%s: dropped %d line(s) after step %d%s.", self.path, dropped, step, ", one torn" if torn else "")
        return dropped

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        rows = self.read()
        self.truncate(rows[-1]["step"] if rows else 0)  # a torn end, or the next line would be glued to it
        self._last = rows[-1]["step"] if rows else None
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        except OSError as error:
            raise WorkdirError(f"cannot write {self.path}: {error.strerror}.") from error

    def _whole_lines(self) -> list[bytes]:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _next_step(row: Any, last: int | None, where: str) -> int:
    """The step of `row`, checked to be an integer larger than `last`."""
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        raise WorkdirError(f"{where}: expected an object with an integer 'step', got {row!r}.")
    if last is not None and step <= last:
        raise WorkdirError(f"{where}: step {step} does not follow step {last}; steps must increase from line to line.")
    return step


def run_info() -> dict[str, Any]:
    """What this run is made with, for `run.json`. Names no host and no user. Call it after `jax.distributed.initialize`.

    `commit` is that of the checkout this package is imported from and `dirty` whether it holds changes that are not
    committed; both None outside of git. `cores` counts what this process may use, not what the machine has.
    """
    devices = jax.devices()
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain")
    flags = {name: os.environ[name] for name in sorted(os.environ) if name in FLAGS or name.startswith("JAX_")}
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COMPILATION_CACHE_DIR"):  # a place, on which no result depends
        flags.pop(name, None)
    return {
        "argv": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "os": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": flags,
        "jax_config": {name: getattr(jax.config, name, None) for name in JAX_CONFIG},
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }


def compare_run_info(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each recorded thing that differs and on which bit-identical results depend; empty if none does."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = sorted({*before, *after} - set(NOT_NUMERIC))
    missing = "not set"
    return [
        f"{name}: {before.get(name, missing)} -> {after.get(name, missing)}"
        for name in names
        if before.get(name, missing) != after.get(name, missing)
    ]


def _leaves(info: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in info.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of a git command in this package's checkout; None without git or outside a checkout."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    """The processor's model and vector extensions: XLA compiles for these, so results depend on them."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line) if cpuinfo.exists() else {}
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    present = {*fields.get("flags", "").split(), *fields.get("Features", "").split()}
    model = fields.get("model name") or platform.processor() or platform.machine()
    return " ".join([model, *(name for name in VECTOR_EXTENSIONS if name in present)])
