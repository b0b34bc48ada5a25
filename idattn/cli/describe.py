"""Print a config's parameter counts, state size, FLOPs and bytes as JSON.

idattn describe --config=configs/paper.py:1.3B,interdomain
"""

import json

from absl import flags
from ml_collections import config_flags

from idattn.config import from_config_dict
from idattn.costs import describe

FLAGS = flags.FLAGS


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", help_string="FILE[:ARGUMENTS] of the run.")
    flags.mark_flag_as_required("config")


def main(_):
    print(json.dumps(describe(from_config_dict(FLAGS.config)), indent=2))
