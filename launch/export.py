"""Write the weights of a checkpoint as model.safetensors with a config.json, which all that takes a checkpoint takes.

python -m launch.export --checkpoint=runs/quickstart --out=exported
"""

from absl import app, flags

from idattn.inference import save_weights
from idattn.train.checkpoint import load_params

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its checkpoints.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)


def main(_):
    config, params, step = load_params(CHECKPOINT.value)
    save_weights(OUT.value, config, params, step)
    print(f"{OUT.value}: the weights of {CHECKPOINT.value}, step {step}")


if __name__ == "__main__":
    app.run(main)
