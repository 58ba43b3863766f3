"""Score a run's best checkpoint on the test split, once: python eval.py --workdir=runs/...

The result is stored in the workdir's eval.json; a second call prints what is stored, unless the run has trained on to a better
step. With --analysis=NAME, what a language model does with its context instead: the workdir's analysis/NAME.json, NAME.md and
NAME.png.
"""

import json
import pathlib

from absl import flags

from efficient_attn import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
ANALYSIS = flags.DEFINE_string("analysis", None, "An analysis of a language model; a wrong name lists them.")
SPLIT = flags.DEFINE_enum("split", "valid", ["train", "valid", "test"], "Text that is analysed.")
TOKENS = flags.DEFINE_integer("tokens", 2**15, "How much of it, from its start.", lower_bound=2)


def main() -> None:
    folder = pathlib.Path(WORKDIR.value)
    if ANALYSIS.value:
        analyse(folder)
        return
    from efficient_attn import evaluation
    from efficient_attn.arguments import ConfigError

    if SPLIT.present or TOKENS.present:
        raise ConfigError("--split and --tokens go with --analysis; the score is of the test split, whole")

    print(json.dumps(evaluation.score_once(folder), indent=1))


def analyse(folder: pathlib.Path) -> None:
    from efficient_attn import analysis, workdir
    from efficient_attn.arguments import lookup

    function = lookup(analysis.ANALYSES, ANALYSIS.value, "--analysis")
    runs = analysis.load(folder, SPLIT.value, TOKENS.value)
    table = analysis.over_seeds({run.seed: function(run) for run in runs})
    run = runs[0]
    made_from = {"step": run.step, "split": run.split, "tokens": len(run.tokens) - 1, "data": run.plan.task.name}
    table.write(folder / "analysis" / ANALYSIS.value, {**workdir.run_info(), **made_from})
    print(table.markdown())
    print(f"wrote {folder / 'analysis' / ANALYSIS.value}.json, .md and .png")


if __name__ == "__main__":
    cli.run(main)
