"""Train a model, or resume the run in --workdir.

idattn train --config=quickstart --workdir=runs/quickstart --config.train.steps=100

On several hosts, start the same command on each: with --distributed=auto where Cloud TPU, SLURM, GKE or Open MPI number
the processes, else with --distributed=HOST:PORT,PROCESSES,ID, where HOST is that of process 0.
"""

import jax
from absl import flags

from idattn.cli.config_flag import define_config
from idattn.train import train

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there is resumed.", required=True)
    flags.DEFINE_string("init_from", "", "Checkpoint whose weights a new run starts from, a folder or hf:OWNER/NAME.")
    flags.DEFINE_list("profile", ["0", "0"], "FIRST,LAST: the steps of a window to profile.")
    flags.DEFINE_multi_string(
        "tracker", [], "Where metrics go too: wandb, or module:Class; may be given several times."
    )
    flags.DEFINE_string("distributed", "", "auto, or HOST:PORT,PROCESSES,ID; empty for one process.")


def connect(processes: str) -> None:
    """Join the other processes of a run; `processes` is the value of --distributed.

    Raises:
      ValueError: it is neither "auto" nor HOST:PORT,PROCESSES,ID.
    """
    if processes == "auto":
        jax.distributed.initialize()
    elif processes:
        address, *numbers = processes.split(",")
        if len(numbers) != 2 or not all(n.isdigit() for n in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise ValueError(f"--distributed={processes} must be auto or HOST:PORT,PROCESSES,ID with ID < PROCESSES.")
        count, process = map(int, numbers)
        jax.distributed.initialize(address, count, process)


def profile_window(values: list[str]) -> tuple[int, int]:
    """The first and last step of the window that --profile names.

    Raises:
      ValueError: these are not two whole numbers.
    """
    if len(values) != 2 or not all(value.strip().isdecimal() for value in values):
        raise ValueError(
            f"--profile={','.join(values)} must be FIRST,LAST, the first and last step to profile, such as "
            "--profile=10,15."
        )
    first, last = map(int, values)
    return first, last


def main(_):
    profile = profile_window(FLAGS.profile)
    connect(FLAGS.distributed)
    train(FLAGS.config, FLAGS.workdir, init_from=FLAGS.init_from, profile=profile, trackers=FLAGS.tracker)
