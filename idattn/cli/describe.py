"""Print a config's parameter counts, state size, FLOPs and bytes as JSON.

idattn describe --config=paper:1.3B,interdomain
"""

import json

from absl import flags

from idattn.cli.config_flag import define_config
from idattn.config import from_config_dict
from idattn.costs import describe

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_config()


def main(_):
    print(json.dumps(describe(from_config_dict(FLAGS.config)), indent=2))
