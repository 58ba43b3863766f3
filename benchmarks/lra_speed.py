"""Time and memory of a training step against length, of every mixer: Long Range Arena's efficiency table on this machine.

    python -m benchmarks.lra_speed --out=results/cpu/lra_speed.json     also writes lra_speed.md and lra_speed.png beside it

The protocol and the published figures are those of configs/tables/lra_speed.py. The input is random bytes: what they are makes no
difference. A mixer runs in a process of its own, for --budget seconds at most, so that none can end the others; every length
it finishes is in the file at once, and the same command again runs what is missing (--again: all that is asked for). Memory is
what the compiled step needs, arguments and temporaries, by XLA's own analysis; a step that needs more than --gigabytes is
compiled but not run. Time is the fastest of --steps steps, since other work on the machine can only add to it; the median is in
the file too. Exponents are least-squares slopes of logarithms, over the lengths that ran.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from configs.tables import lra_speed as table

Row = dict[str, Any]
SETTINGS = ("batch", "depth", "width", "heads")


def measure(name: str, length: int, settings: Mapping[str, int], steps: int, gigabytes: float) -> Row:
    """One cell: bytes that the compiled step needs, and milliseconds of a step."""
    from efficient_attn.plan import example_batch, make_plan
    from efficient_attn.steps import train_step

    plan = make_plan(table.get_config(name, length, **settings))
    shapes = example_batch(plan.task, settings["batch"])
    step = jax.jit(functools.partial(train_step, plan.model, plan.tx), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(plan.state, shapes).compile()
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    row = {"mixer": name, "length": length, "bytes": needed, "compile_s": round(time.perf_counter() - start, 2)}
    if needed > gigabytes * 2**30:
        return row | {"status": f"needs {needed / 2**30:.1f} GB of memory"}
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(1, 257, shapes["inputs"].shape).astype(np.int32),
        "mask": np.ones(shapes["mask"].shape, bool),
        "targets": rng.integers(0, 2, shapes["targets"].shape).astype(np.int32),
        "weights": np.ones(shapes["weights"].shape, np.float32),
    }
    state, times = jax.jit(plan.init_state)(), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, sums = jax.block_until_ready(compiled(state, batch))
        times.append(1e3 * (time.perf_counter() - start))
    if not np.isfinite(sums["loss"][0]):
        raise FloatingPointError(f"{name} at length {length}: the loss is {sums['loss'][0]}")
    return row | {"ms": min(times[1:]), "median_ms": statistics.median(times[1:]), "status": "ran"}


def run_mixer(name: str, lengths: Sequence[int], args: argparse.Namespace) -> Iterable[Row]:
    """The cells of one mixer as a process of its own finishes them, and why those that are missing are."""
    forwarded = [f"--{field}={getattr(args, field)}" for field in (*SETTINGS, "steps", "gigabytes")]
    command = [sys.executable, "-m", "benchmarks.lra_speed", "--worker", name, "--lengths", *map(str, lengths), *forwarded]
    missing = list(lengths)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=harness.ROOT) as process:
        is_late = threading.Event()
        timer = threading.Timer(args.budget, lambda: (is_late.set(), process.kill()))
        messages: list[str] = []
        reader = threading.Thread(target=lambda: messages.extend(process.stderr))
        timer.start()
        reader.start()
        for line in process.stdout:
            row = json.loads(line)
            missing.remove(row["length"])
            yield row
        process.wait()
        timer.cancel()
        reader.join()
    reason = f"not within {args.budget:g} s" if is_late.is_set() else _why_ended(process.returncode, messages)
    for i, length in enumerate(missing):
        yield {"mixer": name, "length": length, "status": reason if i == 0 else "not reached"}


def _why_ended(code: int, messages: Sequence[str]) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    return messages[-1].strip() if code and messages else f"exit status {code}"


def work(args: argparse.Namespace) -> None:
    """What the process of one mixer does: a line of JSON for each length."""
    for length in args.lengths:
        row = measure(args.worker, length, {field: getattr(args, field) for field in SETTINGS}, args.steps, args.gigabytes)
        print(json.dumps(row), flush=True)


def read(out: pathlib.Path | None, settings: Mapping[str, int]) -> dict[tuple[str, int], Row]:
    """The cells that are there already. Raises `SystemExit` where they were measured with other settings."""
    if out is None or not out.exists():
        return {}
    old = json.loads(out.read_text())
    if old["settings"] != settings:
        raise SystemExit(f"{out} was measured with {old['settings']}, not {settings}: give another --out")
    return {(row["mixer"], row["length"]): row for row in old["rows"]}


def exponent(cells: Mapping[int, float]) -> float | None:
    """p of value ~ length^p, by least squares on logarithms; None for fewer than two lengths."""
    if len(cells) < 2:
        return None
    return float(np.polyfit(np.log(list(cells)), np.log(list(cells.values())), 1)[0])


def summary(cells: Mapping[tuple[str, int], Row]) -> list[Row]:
    """For each mixer: ms and MB by length, the exponents of both and the lengths they were fitted on."""
    found: dict[str, Row] = {}
    for (name, length), row in sorted(cells.items(), key=lambda cell: (table.rows().index(cell[0][0]), cell[0][1])):
        of_mixer = found.setdefault(name, {"mixer": name, "ms": {}, "mb": {}, "status": {}})
        if "ms" in row:
            of_mixer["ms"][length] = row["ms"]
        if "bytes" in row:
            of_mixer["mb"][length] = row["bytes"] / 2**20
        of_mixer["status"][length] = row["status"]
    return [row | {"time_exponent": exponent(row["ms"]), "memory_exponent": exponent(row["mb"])} for row in found.values()]


def markdown(rows: Sequence[Row], lengths: Sequence[int]) -> str:
    """Speed and memory over the Transformer's, published ones in brackets, then milliseconds at the ends and exponents."""
    base = next((row for row in rows if row["mixer"] == table.BASELINE), {"ms": {}, "mb": {}})
    ends = (min(lengths), max(lengths))
    body = []
    for row in rows:
        cells: Row = {"mixer": f"`{row['mixer']}`"}
        for kind, title, invert in (("ms", "speed", True), ("mb", "memory", False)):
            for length in lengths:
                cells[f"{title} {_short(length)}"] = _ratio(row, base, kind, length, invert)
        cells |= {f"ms {_short(length)}": _number(row["ms"].get(length)) for length in ends}
        cells |= {f"{kind} ~ L^": _number(row[f"{kind}_exponent"]) for kind in ("time", "memory")}
        body.append(cells | {"fitted to": _short(max(row["ms"])) if row["ms"] else "", "missing": _missing(row)})
    return harness.markdown(body)


def _ratio(row: Row, base: Row, kind: str, length: int, invert: bool) -> str:
    ours = ""
    if length in row[kind] and length in base[kind]:
        ratio = row[kind][length] / base[kind][length]
        ours = f"{1 / ratio if invert else ratio:.2f}"
    paper = table.published(row["mixer"], length)
    return f"{ours} ({paper[0 if invert else 1]:.2f})" if paper else ours


def _missing(row: Row) -> str:
    reasons = {length: status for length, status in row["status"].items() if status not in ("ran", "not reached")}
    return "; ".join(f"{_short(length)}: {reason}" for length, reason in reasons.items())


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def draw(rows: Sequence[Row], out: pathlib.Path) -> None:
    """Milliseconds and megabytes against length, both logarithmic, a line for each mixer with both exponents."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure, ran = Figure(figsize=(15, 7.5), layout="constrained"), {}
    for axes, kind, label in zip(figure.subplots(1, 2), ("ms", "mb"), ("ms a training step", "MB: arguments and temporaries")):
        for i, row in enumerate(rows):
            if row[kind]:
                slopes = (row[f"{of}_exponent"] for of in ("time", "memory"))
                label_of_row = f"{row['mixer']}  {', '.join(map(_number, slopes))}"
                style = dict(color=colormaps["tab20"](i % 20), linestyle=("-", "--", ":")[i // 20 % 3], marker="o", markersize=3)
                (ran[label_of_row],) = axes.loglog(*zip(*row[kind].items()), **style)
        ticks = sorted({length for row in rows for length in row[kind]})
        axes.set(xlabel="length", ylabel=label, xticks=ticks)
        axes.set_xticklabels(map(_short, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(ran.values(), ran.keys(), fontsize=8, loc="outside right upper", title="mixer, exponents of time, memory")
    aside = out.with_name(f".{out.name}.tmp.png")
    figure.savefig(aside, dpi=110)
    aside.replace(out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixers", nargs="+", default=table.rows(), choices=table.rows(), metavar="MIXER")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(table.LENGTHS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--budget", type=float, default=120, help="seconds for one mixer, all lengths and compiling included")
    parser.add_argument("--gigabytes", type=float, default=6, help="memory that a step may need to be run")
    parser.add_argument("--again", action="store_true", help="measure what is asked for even where the file has it")
    for field, default in zip(SETTINGS, (1, 1, 64, 2)):
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file; the table and the plot go beside it")
    parser.add_argument("--worker", choices=table.rows(), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.lengths) < 1 or args.steps < 1 or args.budget <= 0:
        parser.error(f"--lengths={args.lengths} --steps={args.steps} --budget={args.budget}: all must be positive")
    args.lengths = sorted(set(args.lengths))
    return args


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    settings = {field: getattr(args, field) for field in SETTINGS}
    cells = read(args.out, settings)
    for name in args.mixers:
        lengths = [n for n in args.lengths if args.again or cells.get((name, n), {}).get("status") != "ran"]
        for row in run_mixer(name, lengths, args) if lengths else ():
            cells[name, row["length"]] = row
            print(f"{name:20} {row['length']:6} {_number(row.get('ms')):>8} ms  {row['status']}", flush=True)
            harness.write(args.out, list(cells.values()), settings=settings, steps=args.steps)
    rows = summary(cells)
    text = markdown(rows, sorted({length for _, length in cells}))
    print(text)
    harness.write(args.out, list(cells.values()), settings=settings, steps=args.steps, summary=rows)
    if args.out:
        args.out.with_suffix(".md").write_text(text + "\n")
        draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
