"""Compile a run's train step for TPUs or GPUs that need not be there: does it fit, what moves, how fast.

idattn plan --config=paper:1.3B,interdomain --topology=v5e:4x4
idattn plan --config=paper:1.3B,interdomain --topology=v5p:2x2x2 --config.mesh.fsdp=8 --config.compute.remat=dots
idattn plan --config=paper:1.3B,interdomain --topology=v5e:4x4 --compare=paper:1.3B,softmax
idattn plan --config=paper:1.3B,interdomain --topology=2xv5e:4x4  # two slices, joined by the data-centre network (DCN)
idattn plan --config=paper:125M,interdomain --topology=h100:8  # a host of GPUs: h100, a100, l4, t4

The program is the one that `idattn train` would run, kernels included, compiled by the device's own compiler. Without a
mesh in the config, the mesh follows a rule: data over slices, fsdp over the largest number of chips that divides the
rows, sequence over the rest. Rematerialisation and accumulation are searched: from the plan that recomputes least to
the one that recomputes most, each in as few parts as fit, until that is no longer predicted to be faster. The flags to
train by the fastest are printed. The output describes the program, for each chip and step:

  memory       arguments by kind, and temporaries as the compiler allocated them, next to the chip's HBM; of a GPU's to
               the part that JAX takes, three quarters, or XLA_CLIENT_MEM_FRACTION
  collectives  bytes that a chip sends, by kind, from the compiled program, loops multiplied out (a ring's share: an
               all-gather of n shards sends (n - 1)/n of its result, an all-reduce twice that); those between
               slices apart, as "over DCN"
  FLOPs        of the model's mathematics, and what rematerialisation adds
  predicted    the step by part, by the compiler's own estimates of cycles (`idattn.plan.cycles`), the kernels by their
               schedules. Estimates, not measurements. Of GPUs there are none: "program" has the launches of each part,
               the bytes that they move, and how long they take at published peaks, at least.
  bound        the longest of three times at published peaks, were they reached and all overlapped: products, HBM (an
               estimate: weights, optimiser, inputs and outputs of products), links; between slices DCN.

--compare plans another model with all other settings of --config, and prints both steps by part.
"""

import dataclasses
import json
import sys

from absl import flags

from idattn.cli.config_flag import define_config
from idattn.config import MeshConfig, from_config_dict
from idattn.config_files import load_config
from idattn.files import resolve_path, write_atomic
from idattn.plan.compiler import devices_of, load_compiler
from idattn.plan.search import fastest_that_fits, plan_flags
from idattn.plan.step import compare, compile_step, describe

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_config()
    flags.DEFINE_string(
        "topology",
        "v5e:4x4",
        "TPU slice, as v5e:4x4, v5p:2x2x2, v6e:16x16; 2xv5e:4x4 are two. Or GPUs of a host, as h100:8.",
    )
    flags.DEFINE_string("compare", None, "Config whose model is planned too, as paper:1.3B,softmax.")
    flags.DEFINE_string("json", None, "File to write the figures to.")


def say(plan: str) -> None:
    """Show what is compiled next."""
    print(f"compiling for {plan}", file=sys.stderr, flush=True)


def main(_):
    file = resolve_path(FLAGS.json) if FLAGS.json else None
    load_compiler(FLAGS.topology)
    config = from_config_dict(FLAGS.config)
    runs = {"config": config}
    if FLAGS.compare:
        runs["compare"] = dataclasses.replace(config, model=from_config_dict(load_config(FLAGS.compare)).model)
    figures = {}
    for name, run in runs.items():
        if run.mesh == MeshConfig():
            run, figures[name] = fastest_that_fits(run, FLAGS.topology, len(devices_of(FLAGS.topology)), say)
        else:
            say(f"{FLAGS.topology}: {plan_flags(run)}")
            figures[name] = compile_step(run, FLAGS.topology)
        print(describe(figures[name], run))
        if config.mesh == MeshConfig() and figures[name]["fits"]:
            print(f"  flags: {plan_flags(run)}")
    if FLAGS.compare and all(x["fits"] for x in figures.values()):
        print(compare(*figures.values()))
    if file is not None:
        write_atomic(file, json.dumps(figures if FLAGS.compare else figures["config"], indent=1))
