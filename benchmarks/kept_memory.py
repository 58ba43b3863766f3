"""What a process that keeps its memory gains and costs: steps a second, page faults and memory of train.py, with and without.

    python -m benchmarks.kept_memory --config=configs/lra_listops.py:s5 --out=results/cpu/kept_memory.json
    python -m benchmarks.kept_memory --config=configs/quickstart.py --steps=60 -- --config.train.batch_size=16

Whole runs in turns, each of `--steps` steps from nothing; what follows `--` goes to train.py. Without: GLIBC_TUNABLES is set,
to nothing, which tells `efficient_attn.allocator` to leave the allocator as it is. Steps a second are the median of the lines of
metrics.jsonl but the first two, which compile, and run before memory is kept.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks import harness

CASES = {"kept": {}, "given back": {"GLIBC_TUNABLES": ""}}
LINES = 10


def run(config: str, steps: int, more: list[str], environment: dict[str, str]) -> dict:
    """One run of train.py, and what it took."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    with tempfile.TemporaryDirectory() as folder:
        lengths = [f"--config.train.duration={steps} steps", f"--config.train.eval_every={steps} steps"]
        lengths += [f"--config.train.log_every={max(1, steps // LINES)}", "--config.train.max_eval_batches=1"]
        command = [sys.executable, "train.py", f"--config={config}", *lengths, *more, f"--workdir={folder}/run"]
        process = subprocess.Popen(command, cwd=harness.ROOT, env=own | environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}; its own message is above")
        lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "steps_per_second" in line]
    return {
        "steps_per_second": statistics.median(line["steps_per_second"] for line in logged[2:]),
        "train_loss": [line["train_loss"] for line in logged],
        "page_faults": used.ru_minflt,
        "largest_mb": used.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="as for train.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("more", nargs="*", help="further flags of train.py, after --")
    args = parser.parse_args()
    if args.steps < LINES:
        parser.error(f"--steps={args.steps}: give at least {LINES}")
    turns = [{name: run(args.config, args.steps, args.more, own) for name, own in CASES.items()} for _ in range(args.repeats)]
    rows = []
    for name in CASES:
        of_case = [turn[name] for turn in turns]
        numbers = {key: statistics.median(case[key] for case in of_case) for key in of_case[0] if key != "train_loss"}
        rows.append({"memory": name, **numbers})
    faster = sorted(turn["kept"]["steps_per_second"] / turn["given back"]["steps_per_second"] for turn in turns)
    same = len({tuple(case["train_loss"]) for turn in turns for case in turn.values()}) == 1
    print(harness.markdown(rows))
    print(
        f"times faster where kept, turn by turn: {', '.join(f'{x:.2f}' for x in faster)}; losses {'equal' if same else 'DIFFER'}"
    )
    harness.write(args.out, rows, config=args.config, times_faster=faster, losses_equal=same, turns=turns)


if __name__ == "__main__":
    main()
