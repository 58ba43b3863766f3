"""Train and score every run of a table or of a grid of your own: python sweep.py --config=configs/tables/NAME.py

The same command continues what was interrupted, and leaves finished runs alone. --dry-run prints the commands. The exit status is
0 if every run is done, 1 if one has failed, 75 if the sweep was stopped.
"""

import pathlib
import sys

from absl import flags

from efficient_attn import cli

CONFIG = flags.DEFINE_string("config", None, "File with a function sweep(scale) that yields cells.", required=True)
SCALE = flags.DEFINE_string("scale", "paper", "Which of the file's scales: paper is as published, cpu what two cores can do.")
ROOT = flags.DEFINE_string("root", None, "Folder of the runs and of sweep.json; by default runs/NAME.")
LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Processes on this machine, or jobs of a Slurm cluster.")
JOBS = flags.DEFINE_integer(
    "jobs", None, "Runs at once: by default one for each GPU, or one on all cores; Slurm: no limit.", lower_bound=1
)
RETRIES = flags.DEFINE_integer("retries", 3, "How often a run is started again that was preempted or killed.", lower_bound=0)
RETRY_FAILED = flags.DEFINE_bool("retry-failed", False, "Start again what has failed, too.")
DRY_RUN = flags.DEFINE_bool("dry-run", False, "Print what would be run; nothing is written.")
SLURM = flags.DEFINE_list("slurm", [], "sbatch's parameters by submitit's names: partition=gpu,time=MINUTES,gpus_per_node=1")


def main() -> None:
    from efficient_attn.sweeps import command

    path = pathlib.Path(CONFIG.value)
    root, jobs = command.load_jobs(path, SCALE.value, pathlib.Path(ROOT.value) if ROOT.value else None)
    launcher = command.LAUNCHERS[LAUNCHER.value](root, JOBS.value, SLURM.value)
    if DRY_RUN.value:
        print(command.dry_run(jobs, root, launcher, retry_failed=RETRY_FAILED.value))
        return
    about = {"config": CONFIG.value, "scale": SCALE.value, "launcher": LAUNCHER.value}
    if not command.run(jobs, root, launcher, about=about, retries=RETRIES.value, retry_failed=RETRY_FAILED.value):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
