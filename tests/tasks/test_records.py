"""Shards and metadata: layout, resuming after every kind of interruption, two writers at once, and reading."""

import concurrent.futures
import errno
import functools
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

import efficient_attn
from efficient_attn.tasks import records
from efficient_attn.tasks.base import TaskError

FEATURES = tfds.features.FeaturesDict(
    {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"), "label": tfds.features.Scalar(np.int32)}
)
SHARDS = {"train": 3, "valid": 1}


def rows(split: str, shard: int):
    rng = np.random.default_rng([list(SHARDS).index(split), shard])
    for i in range(5 + shard):
        yield {"tokens": rng.integers(0, 256, rng.integers(1, 50), dtype=np.uint8), "label": np.int32(1000 * shard + i)}


def noted_rows(log: str, split: str, shard: int, *, seconds: float = 0.0, trouble: str = ""):
    """`rows`, noting in the file `log` which shard is made; train shard 1 is slow, or gets into trouble."""
    with open(log, "a") as file:
        file.write(f"{split}{shard}\n")
    for example in rows(split, shard):
        if (split, shard) == ("train", 1):
            time.sleep(seconds)
            TROUBLES.get(trouble, lambda: None)()
        yield example


def raise_error():
    raise ValueError("no such digit")


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


TROUBLES = {"error": raise_error, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "full": limit_file_size}


def no_rows(split: str, shard: int):
    yield from ()


def modules_rows(split: str, shard: int):
    yield {"tokens": np.zeros(1, np.uint8), "label": np.int32("jax" in sys.modules)}


def contents(directory: pathlib.Path) -> dict:
    sources = {split: records.open_split(directory, split) for split in SHARDS}
    return {
        split: [(e["tokens"].tolist(), int(e["label"])) for e in map(s.__getitem__, range(len(s)))]
        for split, s in sources.items()
    }


EXPECTED = {
    split: [(e["tokens"].tolist(), int(e["label"])) for shard in range(count) for e in rows(split, shard)]
    for split, count in SHARDS.items()
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("records") / "toy-n1"
    records.prepare(directory, features=FEATURES, shards=SHARDS, generate=rows, workers=2)
    return directory


def test_layout_and_reading_by_tfds(prepared):
    assert sorted(path.name for path in prepared.iterdir()) == [
        ".lock",
        "dataset_info.json",
        "features.json",
        "toy-n1-train.array_record-00000-of-00003",
        "toy-n1-train.array_record-00001-of-00003",
        "toy-n1-train.array_record-00002-of-00003",
        "toy-n1-valid.array_record-00000-of-00001",
    ]
    assert contents(prepared) == EXPECTED
    source = tfds.builder_from_directory(prepared).as_data_source("train")
    assert [(e["tokens"].tolist(), e["label"]) for e in source] == EXPECTED["train"]
    assert "tensorflow" not in sys.modules


def test_examples_are_arrays_of_the_declared_dtypes(prepared):
    example = records.open_split(prepared, "train")[3]
    assert {key: (type(value), value.dtype, value.ndim) for key, value in example.items()} == {
        "tokens": (np.ndarray, np.uint8, 1),
        "label": (np.ndarray, np.int32, 0),
    }


def test_source_survives_pickling_and_threads(prepared):
    source = pickle.loads(pickle.dumps(records.open_split(prepared, "train")))
    indices = list(range(len(source))) * 20
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        labels = [int(example["label"]) for example in pool.map(source.__getitem__, indices)]
    assert labels == [EXPECTED["train"][i][1] for i in indices]


def test_opening_what_is_not_there(prepared, tmp_path):
    with pytest.raises(TaskError, match=r"No prepared data set.*prepare\(\)"):
        records.open_split(tmp_path / "absent", "train")
    with pytest.raises(TaskError, match=r"no split 'test'.*'train', 'valid'"):
        records.open_split(prepared, "test")


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("error", "00001-of-00003 failed: ValueError: no such digit"),
        ("killed", r"died \(exit codes \[-9\]"),
        ("full", "File too large"),
    ],
)
def test_trouble_in_a_worker_is_one_error_and_costs_one_shard(tmp_path, trouble, message):
    directory, log = tmp_path / "toy", tmp_path / "log"
    make = functools.partial(noted_rows, str(log))
    with pytest.raises(TaskError, match=message):
        records.prepare(directory, features=FEATURES, shards=SHARDS, generate=functools.partial(make, trouble=trouble), workers=1)
    assert not records.is_prepared(directory)
    assert [path.name for path in directory.iterdir() if path.suffix] == ["toy-train.array_record-00000-of-00003"]
    records.prepare(directory, features=FEATURES, shards=SHARDS, generate=make, workers=1)
    assert contents(directory) == EXPECTED
    assert log.read_text().split() == ["train0", "train1", "train1", "train2", "valid0"]


def test_a_lost_shard_is_made_again(tmp_path):
    directory, log = tmp_path / "toy", tmp_path / "log"
    make = functools.partial(noted_rows, str(log))
    records.prepare(directory, features=FEATURES, shards=SHARDS, generate=make, workers=1)
    (directory / "toy-train.array_record-00001-of-00003").unlink()
    (directory / "incomplete.123.toy-train.array_record-00001-of-00003").write_bytes(b"half")
    log.unlink()
    assert not records.is_prepared(directory)
    records.prepare(directory, features=FEATURES, shards=SHARDS, generate=make, workers=1)
    assert log.read_text().split() == ["train1"]
    assert contents(directory) == EXPECTED
    assert not list(directory.glob("incomplete*"))


def test_another_data_sets_shards_are_refused(tmp_path):
    directory = tmp_path / "toy"
    directory.mkdir()
    (directory / "toy-train.array_record-00000-of-00009").touch()
    with pytest.raises(TaskError, match=r"not part of this data set, such as toy-train\.array_record-00000-of-00009"):
        records.prepare(directory, features=FEATURES, shards=SHARDS, generate=rows, workers=1)


def test_an_empty_shard_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"generate\('train', 0\) gave no examples"):
        records.prepare(tmp_path / "toy", features=FEATURES, shards=SHARDS, generate=no_rows, workers=1)


def test_a_shard_that_reads_back_short_is_never_published(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_num_records", lambda path: 4)
    shard = records._Shard(tmp_path, "train", 0, 3)
    with pytest.raises(TaskError, match="5 examples were written but 4 read back"):
        records._write_shard(shard, FEATURES, rows)
    assert not shard.path.exists()


def test_an_unwritable_place_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TaskError, match="Cannot prepare"):
        records.prepare(tmp_path / "file" / "toy", features=FEATURES, shards=SHARDS, generate=rows, workers=1)


def test_workers_do_not_import_jax(tmp_path):
    records.prepare(tmp_path / "toy", features=FEATURES, shards={"train": 1}, generate=modules_rows, workers=1)
    assert records.open_split(tmp_path / "toy", "train")[0]["label"] == 0


# Programs of their own, to be interrupted.

PROGRAM = """
import functools, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background inherits that it is ignored
open("imports", "a").write(__name__ + " ")
from efficient_attn.tasks import records
from tests.tasks import test_records as t

if __name__ == "__main__":
    make = functools.partial(t.noted_rows, "log", seconds=float(sys.argv[1]))
    records.prepare(pathlib.Path("toy"), features=t.FEATURES, shards=t.SHARDS, generate=make, workers=2)
"""


def start(folder: pathlib.Path, seconds: float) -> subprocess.Popen:
    """Starts a program that prepares `folder`/toy and takes `seconds` for each row of train shard 1."""
    (folder / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(efficient_attn.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "program.py", str(seconds)],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def all_but_one_shard(directory: pathlib.Path) -> bool:
    return len(list(directory.glob("toy-*"))) == 3 and bool(list(directory.glob("incomplete.*")))


def session_is_empty(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_program_resumes(tmp_path, kill):
    program = start(tmp_path, seconds=0.4)
    wait_for(lambda: all_but_one_shard(tmp_path / "toy"))
    if kill == signal.SIGINT:  # a terminal sends it to every process of the foreground group; here the parent gets it late
        (unfinished,) = (tmp_path / "toy").glob("incomplete.*")
        os.kill(int(unfinished.name.split(".")[1]), kill)
        time.sleep(0.3)
        program.send_signal(kill)
    else:
        program.kill()
    _, said = program.communicate()
    assert program.returncode != 0
    assert said.count("Traceback") == (1 if kill == signal.SIGINT else 0)  # the workers say nothing
    wait_for(lambda: session_is_empty(program.pid))
    records.prepare(
        tmp_path / "toy", features=FEATURES, shards=SHARDS, generate=functools.partial(noted_rows, str(tmp_path / "log"))
    )
    assert contents(tmp_path / "toy") == EXPECTED
    made = (tmp_path / "log").read_text().split()
    assert sorted(made) == sorted(["train0", "train1", "train2", "valid0"] + ["train1"] * (kill == signal.SIGINT))


def test_nothing_is_left_beside_a_complete_data_set_at_any_moment(tmp_path, monkeypatch):
    publish = records._publish

    def seen(temporary, final):
        publish(temporary, final)
        if records.is_prepared(tmp_path / "toy"):  # from here on no other call would remove anything
            assert not list((tmp_path / "toy").glob("incomplete.*"))
            seen.times = 1

    seen.times = 0
    monkeypatch.setattr(records, "_publish", seen)
    records.prepare(tmp_path / "toy", features=FEATURES, shards={"train": 1}, generate=rows, workers=1)
    assert seen.times == 1


def test_two_programs_at_once(tmp_path):
    programs = [start(tmp_path, seconds=0.3), start(tmp_path, seconds=0.3)]
    said = [program.communicate(timeout=60)[1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert sum("another process is preparing" in text for text in said) == 1
    assert sorted((tmp_path / "log").read_text().split()) == ["train0", "train1", "train2", "valid0"]
    assert contents(tmp_path / "toy") == EXPECTED
    assert (tmp_path / "imports").read_text().split() == ["__main__"] * 2  # the workers did not import the program


def test_a_damaged_record_is_one_clear_error(prepared, tmp_path):
    copy = tmp_path / prepared.name
    shutil.copytree(prepared, copy)
    for path in copy.glob("*.array_record-*"):
        data = bytearray(path.read_bytes())
        data[len(data[: len(data) // 2].rstrip(b"\0")) // 2] ^= 1  # within the examples
        path.write_bytes(data)
    source = records.open_split(copy, "train")
    with pytest.raises(TaskError, match=r"cannot read record \d+ of .*, split train: .*Its files are damaged: remove them"):
        list(source)


def test_what_the_system_refuses_is_not_called_damage(prepared, monkeypatch):
    """Nobody is told to remove a sound data set for want of file descriptors."""

    def refused(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(records, "_num_records", refused)
    with pytest.raises(TaskError, match=r"Too many open files\. The files may be whole") as error:
        records.open_split(prepared, "train")
    assert "remove" not in str(error.value)


METADATA = r".*/dataset_info.json or the features.json beside it: "


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "dataset_info.json",
            lambda text: re.sub(r'(Lengths": \[\s*")\d+', r"\g<1>2", text),
            r"records of .* and 2 by dataset_info",
        ),
        ("dataset_info.json", lambda text: text[:100], METADATA),
        ("features.json", lambda text: text.replace("{", "(", 1), METADATA),
        ("toy-n1-train.array_record-00000-of-00003", lambda text: text[:100], r"records of .*-00000-of-00003: "),
    ],
    ids=["lengths", "data set", "features", "records"],
)
def test_what_is_not_as_the_metadata_say_is_refused_in_a_line(prepared, tmp_path, name, damage, message):
    """A shard that is said to be shorter would silently change which example is the i-th."""
    copy = tmp_path / prepared.name
    shutil.copytree(prepared, copy)
    text = (copy / name).read_text(encoding="latin-1")
    assert damage(text) != text
    (copy / name).write_text(damage(text), encoding="latin-1")
    with pytest.raises(TaskError, match=f"^cannot read {message}") as error:
        records.open_split(copy, "train")
    assert "\n" not in str(error.value) and "Its files are damaged: remove them" in str(error.value)
