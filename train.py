"""Train one configuration: python train.py --config=configs/quickstart.py [--config.FIELD=VALUE ...] [--workdir=DIR]

Run the same command again to continue an interrupted run. --check prints the plan without compiling anything.
"""

import pathlib

from absl import flags

from efficient_attn import cli

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/<config>-<recipe>-s<seed>.")
CHECK = flags.DEFINE_bool("check", False, "Print parameters, sizes and costs, then exit; nothing is compiled or written.")
PROFILE = flags.DEFINE_integer("profile", 0, "Trace this many steps into the workdir's profile/.", lower_bound=0)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Be one of several processes, which Slurm, Open MPI or Kubernetes started.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "The same without those: HOST:PORT on the machine of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many processes there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which of them this is, from 0.")
flags.mark_flag_as_required("config")


def main() -> None:
    from efficient_attn import allocator, distributed, plan, training

    allocator.compute_in_callers_thread()

    if CHECK.value:
        print(plan.describe(plan.make_plan(CONFIG.value)))
        return
    if DISTRIBUTED.value or any(flag.value is not None for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)):
        distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    folder = pathlib.Path(WORKDIR.value) if WORKDIR.value else cli.default_workdir(CONFIG.value)
    state, progress = training.train_and_evaluate(CONFIG.value, folder, profile_steps=PROFILE.value)
    if not distributed.is_first():
        return
    reason = f" ({progress.finished})" if progress.finished else ""
    best = "" if progress.best is None else f"; best validation {progress.best:.4g} at step {progress.best_step}"
    print(f"finished at step {int(state.step)}{reason}{best}; run: python eval.py --workdir={folder}")


if __name__ == "__main__":
    cli.run(main)
