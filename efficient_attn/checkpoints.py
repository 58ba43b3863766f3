"""Checkpoints of a run: Orbax saves them asynchronously and atomically, a seal of checksums says whether they are whole.

    checkpoints/
      1200/                    one step: what Orbax's StandardCheckpointer writes, and
        seal.json              progress, metrics, shapes and dtypes, size and SHA-256 of every file, SHA-256 of itself
      1000.damaged/            a step that failed verification, moved aside and ignored from then on; delete it at will

Orbax restores wrong values from a file with a flipped bit without a word, so no step is restored, counted as latest or best, or
kept in place of another before every byte of it agrees with its seal. The seal is written while the step still has its temporary
name: the rename that commits the arrays commits the seal with them, and there is no moment at which a kill leaves one without the
other. (Orbax adds `_CHECKPOINT_METADATA` and `commit_success.txt` around the rename; they are not sealed, and never read.)

Kept are the two newest whole steps (if the newest is damaged there is one before it) and the best by one metric.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jaxtyping import PyTree

from efficient_attn import distributed, quiet_orbax, workdir

SEAL = "seal.json"
KEEP_LATEST = 2
UNSEALED = ("_CHECKPOINT_METADATA", "commit_success.txt", SEAL)  # written after the checksums are taken
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's mark of an unfinished save
DELETING = ".deleting"
ORBAX = ocp.AsyncOptions(create_directories_asynchronously=False, timeout_secs=10**10)  # failed mkdirs block; clocks jump


class CheckpointError(Exception):
    """A checkpoint cannot be written, is damaged or does not fit. The message says what is wrong and what to do."""


class _Damaged(Exception):
    """Why a step is not whole."""


class _SealingHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of array trees, which also writes `seal.json` before the step gets its final name."""

    contents: dict[str, Any]  # what the seal of the save in progress holds besides `files`

    def finalize(self, directory) -> None:
        """Called by Orbax on one process, in the background, when all files are written and before the rename."""
        super().finalize(directory)
        folder = pathlib.Path(os.fspath(directory))
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNSEALED)
        files = {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in paths}
        _write_seal(folder, {**self.contents, "files": files})


@ocp.args.register_with_handler(_SealingHandler, for_save=True)
class _SaveArgs(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_SealingHandler, for_restore=True)
class _RestoreArgs(ocp.args.StandardRestore):
    pass


class Checkpoints:
    """The checkpoints of one run, in `directory`, on a file system that all processes of the run share.

    `metric` is the entry of `save`'s `metrics` that ranks the steps, `mode` says which end is best; of equal values the
    earliest step is best, and a value that is not finite never is.

    Opening it makes the folder and removes the unfinished saves that a killed run left, so one run at a time may hold it
    (`workdir.lock`); raises `CheckpointError` where it cannot write. With `read_only=True` (evaluation beside a live run)
    nothing on disk is changed.
    """

    def __init__(self, directory: pathlib.Path, *, metric: str, mode: Literal["max", "min"], read_only: bool = False):
        self.directory = directory.resolve()
        self._metric, self._sign, self._read_only = metric, {"max": -1.0, "min": 1.0}[mode], read_only
        self._changes = not read_only and jax.process_index() == 0  # whether this process may rename and delete
        self._whole: set[int] = set()  # steps this process has sealed or verified
        self._saving: int | None = None
        quiet_orbax.let_it_fail_quietly()
        self._handler = _SealingHandler()
        self._orbax = ocp.AsyncCheckpointer(self._handler, async_options=ORBAX)
        if self._changes:
            self._prepare_folder()

    def save(self, step: int, state: PyTree, progress: dict[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """Start saving `state` as `step`; returns when the arrays may be changed or donated, before they are on disk.

        `progress` (anything JSON, no arrays) comes back from `restore`. `metrics` are given where the step was evaluated.
        Waits first for the previous save. The arrays of a step are written once: saving a step again replaces its
        progress, adds its metrics, and writes nothing else.

        Raises:
          CheckpointError: this save could not start, or the previous one failed (disk full). Older steps are intact.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened read-only; no step can be saved in it.")
        self.wait()
        if metrics is not None and self._metric not in metrics:
            raise CheckpointError(f"metrics of step {step} lack {self._metric!r}, by which steps are ranked: {sorted(metrics)}.")
        contents = {"step": step, "progress": _checked_json(progress), "metrics": workdir.jsonable(metrics or {})}
        self._handler.contents = {**contents, "arrays": _arrays(state)}
        with self._failing(step):
            if distributed.agreed(lambda: step in self.steps() and self._is_whole(step)):
                self._amend(step, contents)
            else:
                self._orbax.save(self._folder(step), args=_SaveArgs(state))
                self._saving = step

    def wait(self) -> None:
        """Wait until the save in progress is committed with its seal, then delete the steps that need not be kept.

        Raises:
          CheckpointError: that save failed. What it had written is removed; older steps are intact.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        with self._failing(step):
            self._orbax.wait_until_finished()
        self._whole.add(step)
        self._prune()

    def close(self) -> None:
        """Wait for the save in progress and release Orbax's threads. Raises as `wait` does."""
        try:
            self.wait()
        except Exception:
            with contextlib.suppress(OSError):  # of a file that is never read, in the save that failed
                self._orbax.close()
            raise
        self._orbax.close()

    def steps(self) -> list[int]:
        """The committed steps, whole or not, in increasing order."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def latest_step(self) -> int | None:
        """The newest whole step."""
        return next((step for step in reversed(self.steps()) if self._is_whole(step)), None)

    def best_step(self) -> int | None:
        """The whole step with the best finite metric; the earliest of equals; None where no step was evaluated."""
        return next((step for step in self._ranked() if self._is_whole(step)), None)

    def restore(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """State and progress of `step`, bit for bit, after verifying every file of it.

        `abstract_state` has the tree, shapes and dtypes to expect and the shardings to restore onto (arrays, or
        `jax.ShapeDtypeStruct`s; without a sharding, the first local device).

        Raises:
          CheckpointError: the step is missing or damaged, or its arrays are not those of `abstract_state`: names the first.
        """
        self.wait()
        try:
            _verify(self._folder(step))
        except _Damaged as reason:
            problem = f"cannot restore checkpoint {self._folder(step)}: {reason}"
            raise CheckpointError(f"{problem}. Other steps: {self._others(step)}.") from None
        return self._load(step, abstract_state)

    def restore_latest(self, abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, state, progress) of the newest step that verifies; None where there is none.

        Each newer one that fails is named on the log with the reason and moved aside. Raises as `restore` does where
        a whole step does not fit `abstract_state`: that is a wrong configuration, not a damage to step over.
        """
        self.wait()
        return self._restore_first(reversed(self.steps()), abstract_state)

    def restore_best(self, abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """As `restore_latest`, for the best step that verifies."""
        self.wait()
        return self._restore_first(self._ranked(), abstract_state)

    def metrics(self, step: int) -> dict[str, Any]:
        """The metrics `step` was saved with (None where one was not finite), {} without any; KeyError for an unknown step."""
        return self._seals()[step]["metrics"]

    def _restore_first(self, steps: Iterable[int], abstract_state: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        self._whole.clear()  # verify anew: the disk may have changed since
        found = distributed.agreed(lambda: next((step for step in steps if self._is_whole(step)), -1))
        return None if found == -1 else (found, *self._load(found, abstract_state))

    def _load(self, step: int, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        folder = self._folder(step)
        seal = _read_seal(folder)
        if difference := _first_difference(seal["arrays"], _arrays(abstract_state)):
            advice = "Give the config it was made with, or another --workdir."
            raise CheckpointError(f"checkpoint {folder} is of another model or optimiser: {difference}. {advice}")
        try:
            state = self._orbax.restore(folder, args=_RestoreArgs(jax.tree.map(_placed, abstract_state)))
        except Exception as error:
            raise CheckpointError(f"checkpoint {folder} is whole, but Orbax cannot restore it: {error}") from error
        return state, seal["progress"]

    def _seals(self) -> dict[int, dict[str, Any]]:
        """The seals that can be believed, by step."""
        seals = {}
        for step in self.steps():
            with contextlib.suppress(_Damaged):  # reported when the step itself is looked at
                seals[step] = _read_seal(self._folder(step))
        return seals

    def _ranked(self) -> list[int]:
        """Evaluated steps, best first."""
        values = {step: seal["metrics"].get(self._metric) for step, seal in self._seals().items()}
        finite = {step: value for step, value in values.items() if value is not None}
        return sorted(finite, key=lambda step: (self._sign * finite[step], step))

    def _is_whole(self, step: int) -> bool:
        """Whether `step` verifies. One that does not is named on the log and moved aside; nothing is lost."""
        folder = self._folder(step)
        try:
            if step not in self._whole:
                _verify(folder)
        except _Damaged as reason:
            message = f"Skipping checkpoint {folder}: {reason}."
            if self._changes:
                names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged.{number}" for number in itertools.count(1)))
                aside = next(path for path in map(folder.with_name, names) if not path.exists())
                folder.rename(aside)
                message += f" Moved aside to {aside.name}."
            absl_logging.warning(message)
            return False
        self._whole.add(step)
        return True

    def _amend(self, step: int, contents: dict[str, Any]) -> None:
        seal = _read_seal(self._folder(step))
        amended = {**seal, **contents, "metrics": {**seal["metrics"], **contents["metrics"]}}
        if self._changes and amended != seal:
            _write_seal(self._folder(step), amended)

    def _prune(self) -> None:
        """Delete whole steps other than the newest `KEEP_LATEST` and the best."""
        if not self._changes:
            return
        whole = [step for step in self.steps() if self._is_whole(step)]
        for step in set(whole[:-KEEP_LATEST]) - {self.best_step()}:
            doomed = self._folder(step).with_name(f"{step}{DELETING}")
            try:
                self._folder(step).rename(doomed)  # so that a kill in the middle leaves no half of a step
                shutil.rmtree(doomed)
            except OSError as error:
                absl_logging.warning("Could not delete the old checkpoint %s: %s.", doomed, error)

    def _prepare_folder(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
            for path in self.directory.iterdir():
                if TEMPORARY in path.name or path.name.endswith(DELETING):
                    shutil.rmtree(path)
                    absl_logging.warning("Removed %s, left unfinished by a run that was killed.", path)
        except OSError as error:
            reason = f"{error.strerror}. Choose another --workdir."
            raise CheckpointError(f"cannot write checkpoints in {self.directory}: {reason}") from error

    @contextlib.contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """For what saves `step`. Where it fails, what was written is removed (which also frees a full disk)."""
        try:
            with distributed.together():
                yield
        except distributed.PeerLost:
            raise
        except Exception as error:
            self._remove_unfinished(step)
            os_error = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore wraps what the system said in several lines
            reason = os.strerror(int(os_error[1])) if os_error else getattr(error.__cause__, "strerror", None)
            reason = reason or " ".join(str(error).split()).rstrip(".") or repr(error)
            raise CheckpointError(
                f"saving step {step} in {self.directory} failed: {reason}. Checkpoints before it are intact: "
                f"{self._others(step)}. Remove the cause (free some disk space?); the same command continues from the newest."
            ) from error

    def _remove_unfinished(self, step: int) -> None:
        unfinished = self.directory / f"{step}{TEMPORARY}"
        for _ in range(10 if self._changes else 0):  # Orbax's other writers may still be at it and make the folder again
            shutil.rmtree(unfinished, ignore_errors=True)  # start-up removes what cannot be removed now
            time.sleep(0.1)
            if not unfinished.exists():
                break

    def _others(self, step: int) -> list[int]:
        return [other for other in self._seals() if other != step]

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)


def _arrays(state: PyTree) -> dict[str, str]:
    """{path: "float32[8,4]"} of every leaf of `state`, in the tree's order."""
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(f"state leaf {name} is a {type(leaf).__name__}; a checkpoint holds arrays only: make it one.")
        if math.prod(leaf.shape) == 0:
            raise CheckpointError(f"state leaf {name} has no elements (shape {leaf.shape}); Orbax cannot save it: leave it out.")
        described[name] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return described


def _first_difference(saved: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    both = ((name, saved.get(name, "missing"), expected.get(name, "missing")) for name in {**expected, **saved})
    return next((f"{name} is {there} there and {here} here" for name, there, here in both if there != here), None)


def _placed(leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _checked_json(progress: dict[str, Any]) -> dict[str, Any]:
    """`progress` as it will come back. Unlike metrics it must be finite: a resumed run would compute with the null."""
    try:
        return json.loads(json.dumps(progress, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"progress must be finite, plain JSON to be restored exactly: {error}.") from error


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(seal: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()


def _write_seal(folder: pathlib.Path, seal: Mapping[str, Any]) -> None:
    workdir.write_json(folder / SEAL, {**seal, "sha256": _digest(seal)})


def _read_seal(folder: pathlib.Path) -> dict[str, Any]:
    """The seal of `folder`, verified against its own checksum."""
    try:
        seal = workdir.read_json(folder / SEAL)
    except OSError as error:
        raise _Damaged(f"{SEAL} cannot be read ({error.strerror})") from error
    except workdir.WorkdirError as error:
        raise _Damaged(f"{SEAL} is not JSON") from error
    if not isinstance(seal, dict) or seal.pop("sha256", None) != _digest(seal):
        raise _Damaged(f"{SEAL} does not have the checksum it was written with")
    return seal


def _verify(folder: pathlib.Path) -> None:
    """Raises `_Damaged`, naming the first wrong file, unless every file of the step in `folder` is as it was written."""
    if not folder.is_dir():
        raise _Damaged("there is no such step")
    for name, (size, digest) in _read_seal(folder)["files"].items():
        try:
            if (found := (folder / name).stat().st_size) != size:
                raise _Damaged(f"{name} has {found} bytes instead of {size}")
            if _sha256(folder / name) != digest:
                raise _Damaged(f"{name} does not have the checksum it was written with")
        except OSError as error:
            raise _Damaged(f"{name} cannot be read ({error.strerror})") from error
