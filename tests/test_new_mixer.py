"""A new mechanism is one file and one line of a table: the README's example, added to a copy of the repository, is held to the
contract tests and trained."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
COPIED = (
    "efficient_attn",
    "kernels",
    "configs",
    "train.py",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/mixers/test_contract.py",
)


def blocks() -> list[str]:
    """The indented blocks of the README's section, in order."""
    section = (ROOT / "README.md").read_text().split("\n## Add a mechanism\n")[1].split("\n## ")[0]
    found: list[list[str]] = [[]]
    for line in section.split("\n"):
        if line.startswith("    ") or (not line and found[-1]):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [textwrap.dedent("\n".join(block)).strip() + "\n" for block in found if any(block)]


def insert(path: pathlib.Path, before: str, new: str) -> None:
    """`new` as lines before the only line that starts with `before`, indented like it."""
    lines = path.read_text().split("\n")
    (at,) = (i for i, line in enumerate(lines) if line.strip().startswith(before))
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    path.write_text("\n".join([*lines[:at], *(indent + line for line in new.strip().split("\n")), *lines[at:]]))


@pytest.fixture
def clone(tmp_path):
    """A copy of the code with the example added."""
    for name in COPIED:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, target)
    module, entry, recipe = blocks()
    recipe = recipe.split("\n")[0]
    assert len(module.split("\n")) < 40
    mixers = tmp_path / "efficient_attn/mixers"
    (mixers / "moving_average.py").write_text(module)
    insert(
        mixers / "__init__.py", "from efficient_attn.mixers.s4 ", "from efficient_attn.mixers.moving_average import MovingAverage"
    )
    insert(mixers / "__init__.py", '"identity": Entry', entry)
    insert(tmp_path / "configs/quickstart.py", '"identity": {', recipe)
    return tmp_path


def run(clone: pathlib.Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    done = subprocess.run(
        [sys.executable, *command], cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_example_passes_the_contract_and_trains(clone):
    tests = run(clone, "-m", "pytest", "-vv", "-m", "not slow", "tests/mixers/test_contract.py", "-k", "moving_average")
    assert tests.count(" PASSED") >= 9, tests
    where = run(clone, "-c", "import efficient_attn.mixers.moving_average as m; print(m.__file__)")
    assert where.strip().startswith(str(clone))
    flags = ["--config.train.duration=6 steps", "--config.train.log_every=2", "--config.train.max_eval_batches=1"]
    flags += ["--config.train.tensorboard=False", "--config.task.num_examples=512", "--config.task.num_eval=64"]
    run(clone, "train.py", "--config=configs/quickstart.py:moving_average", f"--workdir={clone / 'run'}", *flags)
    lines = [json.loads(line) for line in (clone / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    assert lines[-1]["step"] == 6 and losses[-1] < losses[0]
