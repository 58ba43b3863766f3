"""Tables, plots and one page from finished runs: python report.py --table=configs/tables/recall.py --out=report

python report.py --table=FILE [--scale=cpu] [--root=DIR] [--out=DIR]     Markdown, LaTeX, CSV, JSON and HTML of a table
python report.py --table=FILE --costs                                   the same, after measuring what each step needs
python report.py --runs=runs/a,runs/b [--out=DIR]                       compares runs
python report.py --readme [--check]                                     README's tables, from results/
"""

import pathlib

from absl import flags

from efficient_attn import cli

TABLE = flags.DEFINE_string("table", None, "Configuration file of a table, configs/tables/NAME.py.")
SCALE = flags.DEFINE_string("scale", "", "Only sections of this scale of the table; by default all.")
ROOT = flags.DEFINE_string("root", None, "Folder of the table's runs; by default sweep.py's, runs/NAME.")
COSTS = flags.DEFINE_bool("costs", False, "First compile each cell's training step and keep in costs.json what it needs.")
RUNS = flags.DEFINE_list("runs", None, "Folders of runs to compare.")
OUT = flags.DEFINE_string("out", "report", "Folder to write.")
README = flags.DEFINE_bool("readme", False, "Write the generated tables of README.md.")
CHECK = flags.DEFINE_bool("check", False, "With --readme: write nothing, fail where a table is stale.")


def main() -> None:
    from efficient_attn.arguments import ConfigError
    from efficient_attn.reporting import compare, readme, tables

    chosen = [name for name, value in (("--table", TABLE.value), ("--runs", RUNS.value), ("--readme", README.value)) if value]
    if len(chosen) != 1:
        raise ConfigError("give one of --table=configs/tables/NAME.py, --runs=runs/a,runs/b and --readme")
    out = pathlib.Path(OUT.value)
    if TABLE.value:
        root = pathlib.Path(ROOT.value) if ROOT.value else None
        written = tables.write(pathlib.Path(TABLE.value), out, root=root, scale=SCALE.value, measure=COSTS.value)
    elif RUNS.value:
        written = compare.write([pathlib.Path(name) for name in RUNS.value], out)
    else:
        written = readme.refresh(check=CHECK.value)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    cli.run(main)
