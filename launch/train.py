"""Train a model, or go on with the run in --workdir.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart --config.train.steps=100
"""

from absl import app, flags, logging
from ml_collections import config_flags

from idattn.train import train

CONFIG = config_flags.DEFINE_config_file("config", help_string="FILE[:ARGUMENTS] of the run.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run that is there is resumed.", required=True)
INIT_FROM = flags.DEFINE_string("init_from", "", "Checkpoint whose weights a new run starts from.")
PROFILE = flags.DEFINE_list("profile", ["0", "0"], "First and last step of a window to profile.")
flags.mark_flag_as_required("config")


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
    first, last = map(int, PROFILE.value)
    train(CONFIG.value, WORKDIR.value, init_from=INIT_FROM.value, profile=(first, last))


if __name__ == "__main__":
    app.run(main)
