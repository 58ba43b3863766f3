"""Checkpoints under fire: damaged files, full and read-only disks, and kills inside a save leave the older steps restorable."""

import contextlib
import errno
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import workdir
from efficient_attn.checkpoints import CheckpointError, Checkpoints

State = dict[str, jax.Array]


def make_state(seed: int, width: int = 8) -> State:
    kernel = np.random.default_rng(seed).standard_normal((width, width))
    return {"kernel": jnp.asarray(kernel, jnp.float32), "step": jnp.int32(seed), "mean": jnp.full(3, seed, jnp.bfloat16)}


def assert_identical(restored: State, expected: State) -> None:
    assert restored.keys() == expected.keys()
    for name, leaf in expected.items():
        assert restored[name].dtype == leaf.dtype and np.asarray(restored[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.fixture
def open_checkpoints(tmp_path):
    """Opens `tmp_path/checkpoints` (or another folder), as a run that starts or resumes does."""
    with contextlib.ExitStack() as stack:

        def open_them(directory: pathlib.Path = tmp_path / "checkpoints", **options) -> Checkpoints:
            return stack.enter_context(contextlib.closing(Checkpoints(directory, metric="accuracy", mode="max", **options)))

        yield open_them


def save_all(checkpoints: Checkpoints, accuracies: dict[int, float | None]) -> None:
    for step, accuracy in accuracies.items():
        checkpoints.save(step, make_state(step), {}, None if accuracy is None else {"accuracy": accuracy})
    checkpoints.wait()


def test_what_fails_in_closing_without_a_failed_save_is_told(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", metric="accuracy", mode="max")
    orbax_close = checkpoints._orbax.close

    def close():
        orbax_close()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints._orbax, "close", close)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.close()


# Damage on disk.


def flip_a_bit(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, pathlib.Path.unlink])
def test_any_damaged_file_of_the_newest_step_is_noticed(open_checkpoints, tmp_path, caplog, damage):
    save_all(open_checkpoints(), {1: 0.9, 2: 0.5, 3: 0.7})
    whole = tmp_path / "checkpoints"
    names = [path.relative_to(whole / "3") for path in (whole / "3").rglob("*") if path.is_file()]
    assert len(names) >= 8
    for number, name in enumerate(names):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(whole, copy)
        damage(copy / "3" / name)
        caplog.clear()
        checkpoints = open_checkpoints(copy)
        unsealed = name.name in ("_CHECKPOINT_METADATA", "commit_success.txt")  # because not read
        if unsealed or number == 0:
            latest, state, _ = checkpoints.restore_latest(make_state(0))
            assert_identical(state, make_state(latest))
        assert checkpoints.latest_step() == (3 if unsealed else 2)
        if unsealed:
            continue
        assert f"Skipping checkpoint {copy / '3'}: {name.as_posix()}" in caplog.text
        assert (copy / "3.damaged").is_dir()
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (2, 1)


def test_a_damaged_step_is_replaced_by_a_later_save_and_kept_aside(open_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    save_all(open_checkpoints(), {1: None, 2: None})
    for aside in ("2.damaged", "2.damaged.1"):
        flip_a_bit(folder / "2" / "_METADATA")
        checkpoints = open_checkpoints()
        assert checkpoints.restore_latest(make_state(0))[0] == 1
        assert (folder / aside / "seal.json").is_file()
        save_all(checkpoints, {2: 0.5, 3: None})
        assert_identical(checkpoints.restore(2, make_state(0))[0], make_state(2))
        shutil.rmtree(folder / "3")
        save_all(checkpoints, {1: None})


def test_nothing_whole_is_none_and_said(open_checkpoints, tmp_path, caplog):
    save_all(open_checkpoints(), {1: None, 2: None})
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step / "seal.json").unlink()
    assert open_checkpoints().restore_latest(make_state(0)) is None
    assert caplog.text.count("seal.json cannot be read (No such file or directory)") == 2


def test_damage_done_since_the_last_look_is_noticed(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: None, 2: None})
    checkpoints.save(3, make_state(3), {})
    assert checkpoints.restore_latest(make_state(0))[0] == 3  # waits for the save in progress
    flip_a_bit(tmp_path / "checkpoints" / "3" / "_METADATA")
    assert checkpoints.restore_latest(make_state(0))[0] == 2


def test_an_explicit_restore_of_a_damaged_step_fails(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: None, 2: None})
    truncate(tmp_path / "checkpoints" / "2" / "_METADATA")
    with pytest.raises(
        CheckpointError, match=r"cannot restore checkpoint .*2: _METADATA has \d+ bytes instead of \d+. Other steps: \[1\]"
    ):
        checkpoints.restore(2, make_state(0))
    with pytest.raises(CheckpointError, match=r"cannot restore checkpoint .*5: there is no such step. Other steps: \[1, 2\]"):
        checkpoints.restore(5, make_state(0))


def test_retention_counts_whole_steps_only(open_checkpoints, tmp_path):
    save_all(open_checkpoints(), {1: None, 2: None})
    flip_a_bit(tmp_path / "checkpoints" / "2" / "_METADATA")
    checkpoints = open_checkpoints()
    save_all(checkpoints, {3: None})
    assert checkpoints.steps() == [1, 3]


def test_read_only_changes_nothing(open_checkpoints, tmp_path, caplog):
    save_all(open_checkpoints(), {1: 0.5, 2: None})
    folder = tmp_path / "checkpoints"
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    flip_a_bit(folder / "2" / "_METADATA")
    before = sorted(folder.rglob("*"))
    reader = open_checkpoints(read_only=True)
    assert reader.restore_latest(make_state(0))[0] == reader.restore_best(make_state(0))[0] == 1
    with pytest.raises(CheckpointError, match="read-only"):
        reader.save(4, make_state(4), {})
    assert sorted(folder.rglob("*")) == before
    assert "Skipping checkpoint" in caplog.text


def test_start_up_removes_what_a_kill_left(open_checkpoints, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    save_all(open_checkpoints(), {1: None})
    for name in ("2.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-123", "0.deleting"):
        shutil.copytree(folder / "1", folder / name)
    assert open_checkpoints().latest_step() == 1
    assert [path.name for path in folder.iterdir()] == ["1"]
    assert caplog.text.count("left unfinished by a run that was killed") == 3


# Faults while saving.


@contextlib.contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` bytes fail, as on a full disk (Python ignores SIGXFSZ, so they fail with an error)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_recovery(checkpoints: Checkpoints, caplog) -> None:
    """After a failed save of step 3: one message and no traceback, nothing left behind, and saving works again."""
    assert "Traceback" not in caplog.text
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "2"]
    assert_identical(checkpoints.restore_latest(make_state(0))[1], make_state(2))
    save_all(checkpoints, {3: None})
    assert checkpoints.latest_step() == 3


@pytest.mark.parametrize("raised_by", ["wait", "save"])
def test_a_failed_write_is_one_clear_error(open_checkpoints, caplog, raised_by):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: None, 2: None})
    with file_size_limit(20_000):
        checkpoints.save(3, make_state(3, width=400), {})
        with pytest.raises(CheckpointError, match=r"saving step 3 in .* failed: File too large. Checkpoints before .*: \[1, 2\]"):
            checkpoints.wait() if raised_by == "wait" else checkpoints.save(4, make_state(4), {})
    check_recovery(checkpoints, caplog)


def test_no_space_for_the_seal(open_checkpoints, caplog, monkeypatch):
    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: None, 2: None})

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(workdir.os, "fsync", no_space)
        checkpoints.save(3, make_state(3), {})
        with pytest.raises(CheckpointError, match=r"saving step 3 .* No space left on device"):
            checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"saving step 2 .* No space left on device"):
            checkpoints.save(2, make_state(2), {}, {"accuracy": 1.0})
    assert checkpoints.metrics(2) == {}
    check_recovery(checkpoints, caplog)


def test_the_error_of_a_save_is_the_one_that_is_told(open_checkpoints, monkeypatch):
    """On a disk of 12 KiB Orbax, when it is closed, complains once more: of a file that is never read."""

    def complain() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = open_checkpoints()
    save_all(checkpoints, {1: 0.5})
    monkeypatch.setattr(checkpoints._orbax, "close", complain)
    monkeypatch.setattr(checkpoints, "wait", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.close()


def test_disk_full(open_checkpoints, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    try:
        checkpoints = open_checkpoints(disk / "checkpoints")
        save_all(checkpoints, {1: None, 2: None})
        checkpoints.save(3, make_state(3, width=1000), {})
        with pytest.raises(CheckpointError, match=r"saving step 3 .* failed: No space left on device"):
            checkpoints.wait()
        check_recovery(checkpoints, caplog)
        checkpoints.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextlib.contextmanager
def not_root():
    """File permissions do not bind root: act as an ordinary user for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with not_root(), pytest.raises(CheckpointError, match=r"cannot write checkpoints in .*Permission denied.*--workdir"):
            Checkpoints(pathlib.Path(folder), metric="accuracy", mode="max")
        with not_root(), pytest.raises(CheckpointError, match=r"cannot write checkpoints in .*Permission denied.*--workdir"):
            Checkpoints(pathlib.Path(folder) / "new", metric="accuracy", mode="max")


def test_a_folder_that_becomes_read_only(caplog):
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "checkpoints"
        checkpoints = Checkpoints(folder, metric="accuracy", mode="max")
        save_all(checkpoints, {1: None, 2: None})
        os.chmod(parent, 0o755)
        os.chmod(folder, 0o555)
        with not_root(), pytest.raises(CheckpointError, match=r"saving step 3 .* failed: .*Permission denied"):
            checkpoints.save(3, make_state(3), {})
        os.chmod(folder, 0o755)
        check_recovery(checkpoints, caplog)
        checkpoints.close()


def _python(script: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_process_whose_save_failed_says_it_once_and_ends(tmp_path):
    script = """
        import pathlib, resource, sys, time, numpy as np
        from efficient_attn.checkpoints import CheckpointError, Checkpoints
        saved = Checkpoints(pathlib.Path(sys.argv[1]), metric="accuracy", mode="max")
        saved.save(1, {"w": np.zeros(8)}, {})
        saved.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            saved.save(2, {str(i): np.random.default_rng(i).random(10_000) for i in range(50)}, {})
            saved.close()
        except CheckpointError as error:
            print(time.time())
            sys.exit(str(error))
    """
    done = _python(script, tmp_path)
    ended = time.time()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()  # one message, of Orbax's 50 writers none
    assert line.startswith("saving step 2 ") and "File too large" in line
    assert ended - float(done.stdout) < 20  # no thread of Orbax's holds the process back


KILLED_WHILE_SAVING = """
    import os, pathlib, random, signal, sys, time
    import jax, numpy as np
    from efficient_attn.checkpoints import Checkpoints

    def save_for_ever(folder, ready):
        saved = Checkpoints(folder, metric="accuracy", mode="max")
        rng, step = np.random.default_rng(0), 0
        while True:
            step += 1
            state = {str(i): np.full(1000, step, np.float32) for i in range(20)}
            saved.save(step, state, {"step": step}, {"accuracy": -step})
            if step == 3:  # steps 1 and 2 are committed
                os.write(ready, b"x")

    for number in range(8):  # forked before JAX has started anything
        ready, write = os.pipe()
        if (child := os.fork()) == 0:
            save_for_ever(pathlib.Path(sys.argv[1]) / str(number), write)
        os.read(ready, 1)
        time.sleep(random.Random(number).uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_kill_inside_a_save(open_checkpoints, tmp_path):
    done = _python(KILLED_WHILE_SAVING, tmp_path)
    assert done.returncode == 0, done.stderr
    unfinished = 0
    for number in range(8):
        folder = tmp_path / str(number)
        unfinished += any("tmp" in path.name for path in folder.iterdir())
        checkpoints = open_checkpoints(folder)
        committed = checkpoints.steps()
        wanted = {str(i): jax.ShapeDtypeStruct((1000,), np.float32) for i in range(20)}
        step, state, progress = checkpoints.restore_latest(wanted)
        assert step == committed[-1] >= 2 and progress == {"step": step}  # what is committed is whole, seal included
        assert all((np.asarray(leaf) == step).all() for leaf in state.values())
        assert checkpoints.best_step() == 1
        assert all(path.name.isdecimal() for path in folder.iterdir())
        checkpoints.save(step + 1, state, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == step + 1
    assert unfinished, "no kill fell inside a save: the test shows nothing"
