"""Write the weights of a checkpoint as model.safetensors, with a config, a tokenizer and a model card.

Every program that takes a checkpoint takes the folder, or the repository of the Hugging Face hub.

idattn export --checkpoint=runs/quickstart --out=exported
idattn export --checkpoint=runs/quickstart --out=hf:OWNER/NAME --private
"""

import tempfile
from contextlib import nullcontext

from absl import flags

from idattn.inference import push, save_weights
from idattn.inference.hub import in_hub
from idattn.train.checkpoint import checkpoint_loss, checkpoint_tokenizer, load_params

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its checkpoints.", required=True)
    flags.DEFINE_string("out", None, "Folder to write, or hf:OWNER/NAME to upload.", required=True)
    flags.DEFINE_string("tokenizer", "", "A copy of the checkpoint's tokenizer; empty for the one that it contains.")
    flags.DEFINE_bool("private", False, "Make a repository of the hub private, where there is none yet.")


def main(_):
    config, params, step = load_params(FLAGS.checkpoint)
    tokenizer = checkpoint_tokenizer(FLAGS.checkpoint, config, name=FLAGS.tokenizer)
    with tempfile.TemporaryDirectory() if in_hub(FLAGS.out) else nullcontext(FLAGS.out) as folder:
        save_weights(folder, config, params, step, tokenizer, checkpoint_loss(FLAGS.checkpoint, step))
        where = push(folder, FLAGS.out, private=FLAGS.private) if in_hub(FLAGS.out) else folder
    print(f"{where}: the weights of {FLAGS.checkpoint}, step {step}")
