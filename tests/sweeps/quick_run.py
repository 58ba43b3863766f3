"""A stand-in for train.py and eval.py that takes no time: the same files, exit statuses, lock and signals, and no model.

    python quick_run.py train FOLDER [--steps=N] [--seconds-a-step=X] [--kill-at=STEP[,STEP]] [--fail-at=STEP]
    python quick_run.py eval FOLDER

It kills itself at each of the steps of --kill-at, once. The step it has reached is saved at every step.
"""

import argparse
import fcntl
import json
import os
import pathlib
import signal
import sys
import time


def train(folder: pathlib.Path, options: argparse.Namespace) -> None:
    stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(5)
    (folder / "run.json").write_text(json.dumps({"steps": options.steps, "argv": ["train.py", *sys.argv[1:]]}))
    share = {"cores": sorted(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS")}
    (folder / "share.json").write_text(json.dumps({**share, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}))
    saved, killed = folder / "saved", folder / "killed"
    first = int(saved.read_text()) if saved.exists() else 0
    print(f"continuing from step {first}", flush=True)
    for step in range(first + 1, options.steps + 1):
        time.sleep(options.seconds_a_step)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "steps_per_second": 2.0, "valid_loss": 1.0, "valid_accuracy": step / 10}) + "\n")
        if step == options.fail_at:
            print(f"error: loss is not finite at step {step}", file=sys.stderr)
            sys.exit(4)
        saved.write_text(str(step))
        if str(step) in options.kill_at.split(",") and str(step) not in (killed.read_text() if killed.exists() else "").split():
            with open(killed, "a") as file:
                file.write(f"{step} ")
            os.kill(os.getpid(), signal.SIGKILL)
        if stop:
            print(f"error: stopped after step {step}", file=sys.stderr)
            sys.exit(75)


def evaluate(folder: pathlib.Path) -> None:
    if not (folder / "eval.json").exists():
        (folder / "eval.json").write_text(json.dumps({"test_accuracy": int((folder / "saved").read_text()) / 10}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "eval"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds-a-step", type=float, default=0.0)
    parser.add_argument("--kill-at", default="")
    parser.add_argument("--fail-at", type=int, default=0)
    options = parser.parse_args()
    train(options.folder, options) if options.what == "train" else evaluate(options.folder)
