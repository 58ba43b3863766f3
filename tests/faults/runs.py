"""The short real run that is broken in every way, and what must be true of its folder whenever nobody writes in it."""

import hashlib
import json
import pathlib
import re

import jax
import numpy as np

from efficient_attn.tasks.listops import FEATURES
from tests.faults import programs

NEVER_READ = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # written around the commit
NOT_SEALED = {"seal.json", *NEVER_READ}
TIMES = ("steps_per_second", "tokens_per_second", "input_wait")
FLAGS = (
    "--config=configs/lra_listops.py:s5_short", "--config.task.num_examples=1000", "--config.task.min_length=10",
    "--config.task.max_length=32", "--config.task.max_tokens=32", "--config.model.depth=1", "--config.model.width=16",
    "--config.model.mixer.state_dim=16", "--config.model.mixer.blocks=1", "--config.model.dropout=0.1",
    "--config.train.batch_size=8", "--config.train.eval_every=10 steps",
    "--config.train.max_eval_batches=2", "--config.train.checkpoint_every=3 steps", "--config.train.log_every=2",
    "--config.train.tensorboard=False", "--config.optimizer.warmup=5 steps",
)  # fmt: skip
"""ListOps with records on disk, one layer of S5 with batch statistics and dropout: everything that a resume must restore."""


def train(workdir: pathlib.Path, data_dir: pathlib.Path, *more: str) -> list[str]:
    return ["train.py", f"--workdir={workdir}", *FLAGS, f"--config.task.data_dir={data_dir}", *more]


def rows(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl without the times, which differ from run to run; a torn last line is not a line yet."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines if line.endswith(b"\n")]


def committed(workdir: pathlib.Path) -> list[int]:
    """The steps under their final names."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.exists() else []


def unfinished_saves(workdir: pathlib.Path) -> set[pathlib.Path]:
    """Checkpoints that are being written, or were when the run that wrote them was killed."""
    return set((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def unfinished_shards(data_dir: pathlib.Path) -> set[pathlib.Path]:
    """The same of a data set's files."""
    return set(data_dir.glob("*/incomplete.*"))


def shards(data_dir: pathlib.Path) -> set[pathlib.Path]:
    """The record files that have their final names."""
    return set(data_dir.glob("*/*.array_record-*-of-*")) - unfinished_shards(data_dir)


def partial_files(workdir: pathlib.Path) -> list[str]:
    """Whatever has its final name and is not whole, by checks of our own; must be empty at every moment."""
    wrong = []
    for step in committed(workdir):
        folder = workdir / "checkpoints" / str(step)
        seal = folder / "seal.json"
        files = json.loads(seal.read_text())["files"] if seal.exists() else {}
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        if found.keys() - NOT_SEALED != files.keys() or not seal.exists():
            wrong.append(f"{folder} holds {sorted(found)} and its seal lists {sorted(files)}")
        for name, (size, digest) in files.items():
            data = found[name].read_bytes() if name in found else b""
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                wrong.append(f"{folder / name} is not what the seal says")
    if (workdir / "run.json").exists():
        json.loads((workdir / "run.json").read_text())
    steps = [row["step"] for row in rows(workdir)]
    if steps != sorted(set(steps)):
        wrong.append(f"{workdir / 'metrics.jsonl'}: steps {steps}")
    return wrong


def listing(workdir: pathlib.Path) -> list[str]:
    """Every path under `workdir`, but for those inside a checkpoint: into how many files Orbax divides it varies.

    Checkpoints are stars: a signal that saves off the schedule changes which step is the one before the newest.
    """
    paths = [path.relative_to(workdir) for path in workdir.rglob("*")]
    outside = [path.as_posix() for path in paths if not (path.parts[0] == "checkpoints" and len(path.parts) > 2)]
    return sorted(re.sub(r"^checkpoints/\d+$", "checkpoints/*", path) for path in outside)


def records(data_dir: pathlib.Path, files: pathlib.Path) -> dict[str, list]:
    """The examples in each record file that has its final name (their bytes vary: protocol buffers order no map)."""
    return programs.call(_records, data_dir, files=files)


def _records(data_dir: pathlib.Path) -> dict[str, list]:
    from array_record.python.array_record_module import ArrayRecordReader

    found = {}
    for path in shards(data_dir):
        reader = ArrayRecordReader(str(path))
        examples = [FEATURES.deserialize_example_np(record) for record in reader.read_all()]
        found[path.name] = [[example["tokens"].tolist(), int(example["label"])] for example in examples]
        reader.close()
    return found


def digests(workdir: pathlib.Path, files: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every array of the newest checkpoint, by path, as the project's own reader restores it."""
    return programs.call(_digests, workdir, files=files)


def _digests(workdir: pathlib.Path) -> dict[str, str]:
    from efficient_attn.evaluation import open_checkpoints
    from efficient_attn.plan import make_plan

    config = json.loads((workdir / "run.json").read_text())["config"]
    plan = make_plan({**config, "sharding": {}})  # whatever devices it ran on
    checkpoints = open_checkpoints(plan, workdir)
    _, state, _ = checkpoints.restore_latest(plan.state)
    checkpoints.close()
    return digests_of(state)


def digests_of(state) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves}
