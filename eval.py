"""Score a run's best checkpoint on the test split, once: python eval.py --workdir=runs/...

The result is stored in the workdir's eval.json; a second call prints what is stored.
"""

import json
import pathlib

from absl import flags

from efficient_attn import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)


def main() -> None:
    from efficient_attn import evaluation

    result = evaluation.score_once(pathlib.Path(WORKDIR.value))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    cli.run(main)
