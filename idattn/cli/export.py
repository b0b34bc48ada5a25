"""Write the weights of a checkpoint as model.safetensors with a config.json.

Every program that takes a checkpoint takes the folder.

idattn export --checkpoint=runs/quickstart --out=exported
"""

from absl import flags

from idattn.inference import save_weights
from idattn.train.checkpoint import load_params

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its checkpoints.", required=True)
    flags.DEFINE_string("out", None, "Folder to write.", required=True)


def main(_):
    config, params, step = load_params(FLAGS.checkpoint)
    save_weights(FLAGS.out, config, params, step)
    print(f"{FLAGS.out}: the weights of {FLAGS.checkpoint}, step {step}")
