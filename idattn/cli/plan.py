"""Compile a run's train step for a TPU slice that need not be there: does it fit, what moves, how fast at best.

idattn plan --config=paper:1.3B,interdomain --topology=v5p:2x2x2 --config.mesh.fsdp=8

The program is the one that `idattn train` would run, kernels included, compiled by the TPU's own compiler. What is
printed of it, each chip and step:

  memory       arguments by kind, and temporaries as the compiler allocated them, next to the chip's HBM
  collectives  bytes that a chip sends, by kind, from the compiled program, loops multiplied out (a ring's share: an
               all-gather of n shards sends (n - 1)/n of its result, an all-reduce twice that)
  FLOPs        of the model's mathematics, and what rematerialisation adds
  roofline     the longest of three times at published peaks, were they reached and all overlapped: products, HBM (an
               estimate: weights, optimiser, inputs and outputs of products), links. A bound, not a prediction.
"""

import json
from pathlib import Path

from absl import flags

from idattn.cli.config_flag import define_config
from idattn.config import from_config_dict
from idattn.plan.compiler import load_compiler
from idattn.plan.step import compile_step, describe

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("topology", "v5e:4x4", "TPU slice, as v5e:4x4, v5p:2x2x2, v6e:16x16.")
    flags.DEFINE_string("json", None, "File to write the figures to.")


def main(_):
    load_compiler()
    config = from_config_dict(FLAGS.config)
    figures = compile_step(config, FLAGS.topology)
    print(describe(figures, config))
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps(figures, indent=1))
