"""Writes data sets as TFDS array_record shards, in parallel and resumably, and opens them for random access.

`prepare` divides a data set into shards, each a pure function of (split, shard), and lets a pool of processes write them in
TFDS's own layout: `<name>-<split>.array_record-00000-of-00096`, then `features.json` and `dataset_info.json`. Any TFDS
program can read the result (`tfds.builder_from_directory(directory).as_data_source(split)`); TensorFlow is not needed.

Nothing half-written is ever seen under its final name. A shard is written aside as `incomplete.*`, read back, synced to the
disk and renamed, so a crash or a full disk at any moment loses unfinished shards only and the next call continues from the
rest. The metadata are written last, `dataset_info.json` very last: where it exists, the data set is complete.
"""

import contextlib
import dataclasses
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import shutil
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from efficient_attn.tasks.base import Example, Source, TaskError

Generate = Callable[[str, int], Iterable[dict]]
REPORT_SECONDS = 5.0
_METADATA = "dataset_info.json"
_FEATURES = "features.json"


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file of the data set, and the arguments of `generate` that make it."""

    directory: pathlib.Path
    split: str
    index: int
    count: int

    @property
    def path(self) -> pathlib.Path:
        return self.directory / f"{self.directory.name}-{self.split}.array_record-{self.index:05d}-of-{self.count:05d}"


def prepare(
    directory: pathlib.Path,
    *,
    features: tfds.features.FeaturesDict,
    shards: Mapping[str, int],
    generate: Generate,
    workers: int | None = None,
) -> None:
    """Writes every missing shard of a data set, then its metadata; returns at once if all of it exists.

    Safe to call again after any interruption, and from several processes: the second waits for the first. Progress goes to
    stderr. Ctrl-C stops the workers and keeps the finished shards.

    Args:
      directory: folder of this data set alone; its name becomes the data set's.
      features: what an example holds. Token sequences are quickest (to write and to read) as
        `tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")`.
      shards: number of shards of each split. The finer, the less an interruption loses and the better the ETA.
      generate: picklable pure function; `generate(split, shard)` yields the examples of one shard in order. It runs in
        fresh processes that do not import the calling script.
      workers: number of processes; None means one for each core that this process may use.

    Raises:
      TaskError: the disk is full or not writable, `generate` failed or gave no example for a shard, a worker was killed, or
        the folder holds shards of another data set.
    """
    directory = pathlib.Path(directory).absolute()
    if is_prepared(directory):  # without the lock, so that a read-only folder can be used
        return
    plan = [_Shard(directory, split, i, count) for split, count in shards.items() for i in range(count)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _exclusive(directory):
            if not is_prepared(directory):  # by the process that we waited for
                _fill(directory, plan, features, generate, workers or num_cores())
    except OSError as error:
        raise TaskError(f"Cannot prepare {directory}: {error}") from error


def _fill(directory: pathlib.Path, plan: list[_Shard], features, generate: Generate, workers: int) -> None:
    _remove_leftovers(directory)
    foreign = {path.name for path in directory.glob("*.array_record-*")} - {shard.path.name for shard in plan}
    if foreign:
        raise TaskError(
            f"{directory} holds {len(foreign)} shards that are not part of this data set, such as {min(foreign)}; "
            f"expected names like {plan[0].path.name}. Move them away, or choose another data_dir."
        )
    try:
        if todo := [shard for shard in plan if not shard.path.exists()]:
            _write_shards(todo, len(plan), features, generate, min(workers, len(todo)))
        _write_metadata(directory, features, plan)
    finally:
        _remove_leftovers(directory)
    _say(f"{directory.name}: prepared in {directory}")


def num_cores() -> int:
    """Of those that this process may use, which a batch system or a sweep can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_prepared(directory: pathlib.Path) -> bool:
    """Whether the metadata, which are written last, and every shard that they name exist.

    Raises `TaskError` where the metadata cannot be read.
    """
    if not (directory / _METADATA).exists():
        return False
    with _reading_metadata(directory):
        splits = tfds.builder_from_directory(directory).info.splits.values()
        return all(pathlib.Path(path).exists() for split in splits for path in split.filepaths)


def open_split(directory: pathlib.Path, split: str) -> Source:
    """Opens one split for random access: `source[i]` is a dict of NumPy arrays, scalars as 0-d arrays.

    The source can be read by several threads at once and pickled. Raises `TaskError` if the data set is not prepared, has no
    such split, or is not what its metadata say.
    """
    if not is_prepared(directory):
        raise TaskError(f"No prepared data set in {directory}: call the task's prepare() first (train.py does).")
    with _reading_metadata(directory):
        builder = tfds.builder_from_directory(directory)
        if split not in builder.info.splits:
            raise TaskError(f"{directory} has no split {split!r}; it has {sorted(builder.info.splits)}.")
        _check_lengths(builder.info.splits[split])
        dtypes = {k: np.dtype(f.np_dtype) for k, f in builder.info.features.items()}
        return _Records(builder.as_data_source(split), dtypes, f"{directory}, split {split}")


@contextlib.contextmanager
def _reading_metadata(directory: pathlib.Path) -> Iterator[None]:
    try:
        for name in (_METADATA, _FEATURES):
            (directory / name).open("rb").close()  # TFDS says only that it could not read them
        yield
    except TaskError:
        raise
    except Exception as error:  # JSON, protobuf and TFDS each raise their own
        raise _damaged(f"{directory / _METADATA} or the {_FEATURES} beside it", error) from error


def _check_lengths(split: tfds.core.SplitInfo) -> None:
    """Which example is the i-th depends on how many each shard is said to hold, and of that there is no checksum."""
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
        try:
            pathlib.Path(path).open("rb").close()
            found = _num_records(pathlib.Path(path))
        except Exception as error:
            reason = error if str(error) else "it is not a whole array_record file"
            raise _damaged(f"records of {path}", reason) from error
        if found != length:
            raise _damaged(f"records of {path}", f"there are {found}, and {length} by {_METADATA}")


def _damaged(what: str, error: Exception | str) -> TaskError:
    """What the system refuses, for want of files, memory or permission, says nothing about the data."""
    if isinstance(error, OSError | MemoryError) and not isinstance(error, FileNotFoundError):
        refusal = getattr(error, "strerror", None) or "out of memory"
        return TaskError(f"cannot read {what}: {refusal}. The files may be whole: mend that, and run the same command again.")
    reason = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
    advice = "Its files are damaged: remove them, and the same command makes or asks for them again."
    return TaskError(f"cannot read {what}: {reason}. {advice}")


@dataclasses.dataclass(frozen=True)
class _Records:
    """A TFDS source whose examples are arrays of the declared dtypes (TFDS decodes scalars to Python numbers).

    A record that cannot be read is a `TaskError` that says where.
    """

    base: Sequence
    dtypes: Mapping[str, np.dtype]
    where: str

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Example:
        try:
            example = self.base[index]
            return {key: np.asarray(example[key], dtype) for key, dtype in self.dtypes.items()}
        except Exception as error:  # array_record, protobuf and TFDS each raise their own
            raise _damaged(f"record {index} of {self.where}", error) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# The folder: one owner at a time, no leftovers.


@contextlib.contextmanager
def _exclusive(directory: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock, waiting for another process that has it. The system drops it when its holder dies."""
    with open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{directory.name}: another process is preparing {directory}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_leftovers(directory: pathlib.Path) -> None:
    for path in directory.glob("incomplete.*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _publish(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Gives a finished file its name, after its contents have reached the disk."""
    for path in (temporary, final.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.replace(temporary, final)


# The parent: hands out shards one at a time, reports, and ends the workers whatever happens.


def _write_shards(todo: list[_Shard], total: int, features, generate: Generate, workers: int) -> None:
    name = todo[0].directory.name
    _say(f"{name}: writing {len(todo)} of {total} shards with {workers} processes; an interrupted run continues here")
    started = reported = time.monotonic()
    waiting, finished = iter(todo), 0
    processes = {}
    try:
        for _ in range(workers):
            processes.update([_start_worker(features, generate)])
        for pipe in processes:
            pipe.send(next(waiting))
        while finished < len(todo):
            for pipe in multiprocessing.connection.wait(list(processes), timeout=REPORT_SECONDS):
                _raise_failure(pipe.recv())
                finished += 1
                if (shard := next(waiting, None)) is not None:
                    pipe.send(shard)
            now = time.monotonic()
            if now - reported >= REPORT_SECONDS:
                reported, elapsed = now, now - started
                left = f"about {_clock(elapsed / finished * (len(todo) - finished))} left" if finished else "no shard done yet"
                _say(f"{name}: {total - len(todo) + finished}/{total} shards, {_clock(elapsed)} elapsed, {left}")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        _end(processes.values())
        codes = [process.exitcode for process in processes.values() if process.exitcode != -signal.SIGTERM]
        raise TaskError(
            f"A worker process died (exit codes {codes}; -9 often means out of memory: try fewer workers). "
            "Finished shards are kept; the same command continues from them."
        ) from None
    finally:
        _end(processes.values())


def _end(processes) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _raise_failure(failure: tuple[str, str] | None) -> None:
    """Raises what a worker answered, unless that is success (None); the worker's traceback goes with it as a note."""
    if failure is not None:
        message, details = failure
        error = TaskError(f"{message}. Finished shards are kept; once the cause is removed, the same command continues.")
        error.add_note(details)
        raise error


def _start_worker(features, generate: Generate):
    """Starts a process that knows how to make shards; returns our end of its pipe, and the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    work = pickle.dumps((features, generate))
    process = context.Process(target=_worker, args=(theirs, work), daemon=True)
    with _spawning(hide_main=b"__main__" not in work):
        process.start()
    theirs.close()  # so that the pipe breaks when either side dies
    return ours, process


@contextlib.contextmanager
def _spawning(hide_main: bool) -> Iterator[None]:
    """Set-up around the start of a worker.

    Ctrl-C reaches every process of a terminal: workers leave it to the parent, by inheriting a mask that blocks it.
    A spawned process imports its parent's script again, which for train.py means JAX: unless the work itself is defined
    there, an empty module takes the script's place.
    """
    main = sys.modules["__main__"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if hide_main:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# The worker.


def _worker(pipe, work: bytes) -> None:
    """Writes the shards that come down the pipe, answering None or (message, traceback), until the parent closes it."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            shard = pipe.recv()
            try:
                features, generate = pickle.loads(work)
                _write_shard(shard, features, generate)
                failure = None
            except Exception as error:
                reason = str(error) if isinstance(error, TaskError) else f"{type(error).__name__}: {error}"
                reason = reason.partition("; writing ")[0]  # array_record goes on with names and places
                failure = (f"Writing {shard.path} failed: {reason}", traceback.format_exc())
            pipe.send(failure)


def _write_shard(shard: _Shard, features, generate: Generate) -> None:
    temporary = shard.directory / f"incomplete.{os.getpid()}.{shard.path.name}"
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
    written = 0
    for example in generate(shard.split, shard.index):
        writer.write(features.serialize_example(example))
        written += 1
    writer.close()
    if written == 0:
        raise TaskError(f"generate({shard.split!r}, {shard.index}) gave no examples")
    if (found := _num_records(temporary)) != written:
        raise TaskError(f"{written} examples were written but {found} read back: is the disk full or failing?")
    _publish(temporary, shard.path)


def _num_records(path: pathlib.Path) -> int:
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _write_metadata(directory: pathlib.Path, features, plan: list[_Shard]) -> None:
    """Writes `features.json` and what goes with it, and then `dataset_info.json`, which declares the data set complete."""
    name = directory.name
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(directory), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record")
    splits = []
    for split in dict.fromkeys(shard.split for shard in plan):
        paths = [shard.path for shard in plan if shard.split == split]
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[_num_records(path) for path in paths],
                num_bytes=sum(path.stat().st_size for path in paths),
                filename_template=template,
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(splits))
    aside = directory / "incomplete.metadata"
    aside.mkdir()
    info.write_to_directory(aside)
    last = (aside / _METADATA).rename(directory / f"incomplete.{_METADATA}")
    for path in aside.iterdir():
        _publish(path, directory / path.name)
    aside.rmdir()
    _publish(last, directory / _METADATA)
