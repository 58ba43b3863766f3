"""Break a short run in every way, and see that nothing is lost.

python -m tests.faults --kills=200 --seed=0 --out=results/cpu/faults/kills.json      random kills, each one continued
    python -m tests.faults --table=docs/faults.md                                        every other fault once, as a table
"""

import argparse
import os
import pathlib
import shutil
import tempfile


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="how many random kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=60, help="of the run that is killed")
    parser.add_argument("--out", type=pathlib.Path, help="write what happened to this JSON file")
    parser.add_argument("--table", type=pathlib.Path, help="do every other fault once, and write the table to this Markdown file")
    parser.add_argument("--only", nargs="+", help="these faults, as the table names them; its other rows stay")
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-")).resolve()
    prepare(folder)

    from efficient_attn import workdir
    from tests.faults import faults, kills, table

    (folder / "runs").mkdir()
    if args.kills:
        summary = kills.report(folder / "runs", args.kills, args.seed, args.steps)
        left = sorted(path.name for path in (folder / "tmp").iterdir())
        assert not left, f"temporary files are left: {left}"
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            workdir.write_json(args.out, summary)
    if args.table or args.only:
        if unknown := set(args.only or ()) - set(faults.FAULTS):
            shutil.rmtree(folder)
            parser.error(f"--only: there is no {unknown.pop()!r}; there are: {', '.join(faults.FAULTS)}")
        (folder / "table").mkdir()
        folder.chmod(0o755)  # for the fault that is an ordinary user's
        rows = {}
        old = args.table.read_text() if args.table and args.table.exists() else ""
        for name, row in table.rows_of(folder / "table", args.only or faults.FAULTS):
            rows[name] = row
            if args.table:
                args.table.parent.mkdir(parents=True, exist_ok=True)
                args.table.write_text(table.markdown(rows, old))
    shutil.rmtree(folder)


def prepare(folder: pathlib.Path) -> None:
    """The environment of the programs, set before JAX is imported: temporary files that can be counted, one compilation cache."""
    (folder / "tmp").mkdir()
    os.environ.update(TMPDIR=str(folder / "tmp"), JAX_COMPILATION_CACHE_DIR=str(folder / "cache"), PYTHONUNBUFFERED="1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


if __name__ == "__main__":
    main()
