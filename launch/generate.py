"""Continue a prompt with a trained model.

python -m launch.generate --checkpoint=runs/quickstart --prompt="It was a truth"
"""

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from idattn.data import load_tokenizer
from idattn.inference import generate
from idattn.nn import LanguageModel
from idattn.train.checkpoint import load_params

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its checkpoints.", required=True)
PROMPT = flags.DEFINE_string("prompt", "", "Text to continue; empty starts a document.")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 400, "Tokens to add.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among this many most likely tokens; 0: among all.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, params, step = load_params(CHECKPOINT.value)
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = nnx.eval_shape(lambda: LanguageModel(config.model, config.compute, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.graphdef(model), params)
    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(PROMPT.value)]).astype(np.int32)
    tokens = generate(
        model,
        jnp.tile(prompt, (NUM_SAMPLES.value, 1)),
        NUM_TOKENS.value,
        seed=SEED.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
    )
    print(f"{CHECKPOINT.value}, step {step}")
    for row in np.asarray(tokens):
        print(f"\n{PROMPT.value}{tokenizer.decode(row)}")


if __name__ == "__main__":
    app.run(main)
