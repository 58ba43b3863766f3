"""Jobs over quick_run.py, a stand-in for train.py and eval.py that takes a tenth of a second."""

import pathlib
import sys

from efficient_attn.sweeps.jobs import Job

QUICK_RUN = pathlib.Path(__file__).parent / "quick_run.py"


def quick_job(root: pathlib.Path, name: str, *flags: str) -> Job:
    """A run of quick_run.py, with flags of its `train`."""
    folder = root / name
    program = (sys.executable, "-S", "-E", str(QUICK_RUN))
    return Job(name, name, folder, ((*program, "train", str(folder), *flags), (*program, "eval", str(folder))))
