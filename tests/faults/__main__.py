"""Break a short run in every way, and see that nothing is lost.

    python -m tests.faults --kills=200 --seed=0 --out=results/cpu/faults/kills.json     kills at random moments, each continued
    python -m tests.faults --repeat=20 --seed=0 --out=results/cpu/faults/faults.json    every other fault, each time elsewhere
    python -m tests.faults --table=docs/faults.md                                       the same as documented, as a table

--minutes bounds the first two: after so many nothing new is begun. The exit status is 1 if anything went as it should not.
"""

import argparse
import math
import os
import pathlib
import shutil
import sys
import tempfile


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=int, default=0, help="how many kills at random moments")
    what.add_argument("--repeat", type=int, default=0, help="how often to make each fault, at random steps, places and sizes")
    what.add_argument(
        "--table", type=pathlib.Path, help="make each fault as documented, and write the table to this Markdown file"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--first", type=int, default=0, help="with --repeat: from the so manieth on, to see one again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which nothing new is begun")
    parser.add_argument("--steps", type=int, default=60, help="with --kills: of the run that is killed")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="these faults, as the table names them; its other rows stay")
    parser.add_argument("--out", type=pathlib.Path, help="with --kills or --repeat: write what happened to this JSON file")
    args = parser.parse_args()
    if not (args.kills or args.repeat or args.table or args.only):
        parser.error("give --kills=N, --repeat=N, --table=FILE or --only FAULT ...")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    prepare(folder)

    from efficient_attn import workdir
    from tests.faults import faults, kills, repeat, table

    names = args.only or list(faults.FAULTS)
    if unknown := set(names) - set(faults.FAULTS):
        shutil.rmtree(folder)
        parser.error(f"--only: there is no {unknown.pop()!r}; there are: {', '.join(faults.FAULTS)}")
    folder.chmod(0o755)  # for the fault that is an ordinary user's
    summary = {}
    if args.kills:
        summary = kills.report(folder, args.kills, args.seed, args.steps, args.minutes)
    elif args.repeat:
        summary = repeat.campaign(folder, names, args.repeat, args.seed, args.first, args.minutes)
    else:
        table.write(folder, names, args.table)
    if summary and args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        workdir.write_json(args.out, summary)
    if summary.get("findings"):
        return 1
    shutil.rmtree(folder)
    return 0


def prepare(folder: pathlib.Path) -> None:
    """The environment of the programs, set before JAX is imported: temporary files that can be counted, one compilation cache."""
    (folder / "tmp").mkdir()
    os.environ.update(TMPDIR=str(folder / "tmp"), JAX_COMPILATION_CACHE_DIR=str(folder / "cache"), PYTHONUNBUFFERED="1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


if __name__ == "__main__":
    sys.exit(main())
