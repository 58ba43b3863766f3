"""A sweep of twelve short runs, two of which are killed (`kill -9`) while they train and one of which must fail.

    python -m tests.sweeps.twelve_runs --out=results/cpu/sweep_twelve_runs.json

Ends with an error unless eleven runs are done, one has failed with its reason, the sweep's exit status is 1, the two killed ones
were continued from a checkpoint, and a second invocation starts nothing. About three minutes on two quiet cores.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

from efficient_attn import workdir

ROOT = pathlib.Path(__file__).parents[2]
GRID = """
from efficient_attn.tables import Cell

SMALL = {
    "model.width": 16, "task.num_eval": 64, "train.batch_size": 16, "train.duration": "400 steps",
    "train.eval_every": "100 steps",
    "train.checkpoint_every": "20 steps", "train.log_every": 10, "train.tensorboard": False, "optimizer.warmup": "0 steps",
}

def sweep(scale):
    for mixer in ("softmax", "identity"):
        for rate in (1e-3, 3e-3, 1e-2):
            for seed in (0, 1):
                rate = 1e38 if (mixer, rate, seed) == ("softmax", 1e-2, 1) else rate
                yield Cell(f"configs/quickstart.py:{mixer}", mixer, "recall", "grid", {**SMALL, "optimizer.learning_rate": rate},
                           seed=seed, choice=f"lr={rate:g}")
"""
VICTIMS = ("grid/softmax-recall-lr=0.001-s1", "grid/identity-recall-lr=0.003-s0")
FAILS = "grid/softmax-recall-lr=1e+38-s1"


def runs(root: pathlib.Path) -> dict[str, dict]:
    path = root / "sweep.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def kill_once_it_trains(root: pathlib.Path, name: str) -> bool:
    """Kill the run `name` with SIGKILL if it trains and has saved; whether it was killed."""
    record = runs(root).get(name, {})
    saved = [path for path in (root / name / "checkpoints").glob("*") if path.name.isdecimal()]
    if record.get("state") != "running" or not saved or (root / name / "eval.json").exists():
        return False
    os.kill(int(re.match(r"pid (\d+)", record["where"])[1]), signal.SIGKILL)
    return True


def sweep(grid: pathlib.Path, root: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "sweep.py", f"--config={grid}", f"--root={root}", "--jobs=2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def show(folder: pathlib.Path) -> dict:
    grid, root = folder / "grid.py", folder / "runs"
    grid.write_text(GRID)
    began = time.monotonic()
    first, left = sweep(grid, root), list(VICTIMS)
    while left and first.poll() is None:
        left = [name for name in left if not kill_once_it_trains(root, name)]
        time.sleep(0.05)
    printed, _ = first.communicate()
    seconds = time.monotonic() - began
    print(printed)
    found = runs(root)
    states = [record["state"] for record in found.values()]
    assert not left and first.returncode == 1, (left, first.returncode)
    assert states.count("done") == 11 and found[FAILS]["state"] == "failed", states
    assert "not finite" in found[FAILS]["reason"] and found[FAILS]["reason"] in printed
    resumed = {}
    for name in VICTIMS:
        steps = [json.loads(line)["step"] for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        assert found[name]["attempts"] == 2 and steps == list(range(10, 401, 10)), (found[name], steps)
        (resumed[name],) = re.findall(r"^continuing from (step \d+)$", (root / name / "log.txt").read_text(), re.MULTILINE)
    logs = {path: path.read_bytes() for path in root.rglob("log.txt")}
    second = sweep(grid, root)
    printed_again, _ = second.communicate()
    assert second.returncode == 1 and "0 to run" in printed_again and logs == {path: path.read_bytes() for path in logs}
    return {
        "states": {state: states.count(state) for state in sorted(set(states))}, "exit_status": first.returncode,
        "failed": found[FAILS]["reason"], "killed_and_continued_from": resumed,
        "second_invocation": printed_again.splitlines()[0].split(": ")[1],
        "seconds": round(seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/cpu/sweep_twelve_runs.json"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        result = show(pathlib.Path(folder))
    info = workdir.run_info()
    about = {name: info[name] for name in ("versions", "cpu", "cores", "commit", "dirty")}
    out.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_json(out, {"command": "python -m tests.sweeps.twelve_runs", **result, **about})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
