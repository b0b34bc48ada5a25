"""Write the weights of a checkpoint as model.safetensors with a config.json.

Every program that takes a checkpoint takes the folder.

idattn export --checkpoint=runs/quickstart --out=exported
"""

from absl import flags

from idattn.inference import save_weights
from idattn.train.checkpoint import checkpoint_tokenizer, load_params

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its checkpoints.", required=True)
    flags.DEFINE_string("out", None, "Folder to write.", required=True)
    flags.DEFINE_string("tokenizer", "", "A copy of the checkpoint's tokenizer; empty for the one that it contains.")


def main(_):
    config, params, step = load_params(FLAGS.checkpoint)
    tokenizer = checkpoint_tokenizer(FLAGS.checkpoint, config, name=FLAGS.tokenizer)
    save_weights(FLAGS.out, config, params, step, tokenizer)
    print(f"{FLAGS.out}: the weights of {FLAGS.checkpoint}, step {step}")
