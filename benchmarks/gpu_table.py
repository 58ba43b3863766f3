"""The figures of `benchmarks.gpu_attention` as a table and a plot, beside the file that holds them.

python -m benchmarks.gpu_table results/nvidia-h100-80gb-hbm3/attention.json     attention.md and attention.png there
"""

import argparse
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure

from benchmarks import harness

PASSES = "forward", "backward"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each shape and pass: TFLOP/s of each contestant, and how many times as fast as cuDNN `mosaic` is."""
    names = _names(rows)
    lines = []
    for row in sorted(rows, key=_order):
        found = row["contestants"]
        cells = {name: f"{found[name]['tflops']:.0f}" if name in found else "–" for name in names}
        ratio = found.get("mosaic", {}).get("of cudnn")
        line = {"D": row["head_size"], "mask": row["mask"], "N": row["length"], "pass": row["pass"]}
        lines.append(line | cells | {"mosaic : cudnn": "–" if ratio is None else f"{ratio:.2f}"})
    return harness.markdown(lines)


def plot(rows: list[dict[str, Any]], title: str, out: pathlib.Path) -> None:
    """A panel for each pass, a group of bars for each shape."""
    names, cases = _names(rows), sorted({_shape(row) for row in rows})
    figure = Figure(figsize=(max(7, 0.75 * len(cases)), 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for panel, which in zip(panels, PASSES, strict=True):
        found = {_shape(row): row["contestants"] for row in rows if row["pass"] == which}
        for i, name in enumerate(names):
            at = [
                x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x, case in enumerate(cases) if name in found.get(case, {})
            ]
            heights = [found[case][name]["tflops"] for case in cases if name in found.get(case, {})]
            panel.bar(at, heights, 0.8 / len(names), label=name)
        panel.set(ylabel=f"{which}, TFLOP/s")
        panel.grid(axis="y", alpha=0.3)
    panels[1].set_xticks(range(len(cases)), [f"D={size}\n{mask}\nN={length}" for size, mask, length in cases], fontsize=8)
    panels[0].set_title(title)
    panels[0].legend(ncols=len(names), fontsize=8)
    figure.savefig(out, dpi=120)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    """Ours first, in the order in which they take turns."""
    return list(dict.fromkeys(name for row in rows for name in row["contestants"]))


def _shape(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["head_size"], row["mask"], row["length"]


def _order(row: dict[str, Any]) -> tuple:
    return *_shape(row), PASSES.index(row["pass"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path, help="what benchmarks.gpu_attention wrote")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file} is not there; python -m benchmarks.gpu_attention writes it")
    found = json.loads(args.file.read_text())
    device, version = found["environment"]["device"], found["environment"]["jax"]
    title = f"{device}: {found['tokens']} tokens of width {found['width']}, bfloat16, jax {version}"
    text = f"{title}. Made by `{found['command']}`, TFLOP/s of allowed pairs.\n\n{table(found['rows'])}\n"
    args.file.with_suffix(".md").write_text(text)
    plot(found["rows"], title, args.file.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
