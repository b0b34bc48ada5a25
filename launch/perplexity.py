"""Print a trained model's perplexity on every document that its run held out.

python -m launch.perplexity --checkpoint=runs/quickstart [--max_windows=1000]
"""

import jax
import numpy as np
from absl import app, flags, logging
from flax import nnx
from tqdm import tqdm

from idattn.data import eval_batches, load_data
from idattn.evals.perplexity import document_losses, token_losses
from idattn.nn import LanguageModel
from idattn.train.checkpoint import load_params

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, or of one of its checkpoints.", required=True)
MAX_WINDOWS = flags.DEFINE_integer(
    "max_windows", 1000, "Windows to read of each source, from its beginning.", lower_bound=1
)


def main(_):
    logging.set_verbosity(logging.WARNING)
    config, params, step = load_params(CHECKPOINT.value)
    tokenizer, _, sources = load_data(config.data)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config.model, config.compute, rngs=nnx.Rngs(0))))
    losses = jax.jit(lambda batch: token_losses(graphdef, params, batch, config))
    print(f"{CHECKPOINT.value}, step {step}\n    tokens  nats per token  perplexity  document")
    for windows in sources:
        part = [windows[number] for number in range(min(len(windows), MAX_WINDOWS.value))]
        batches = list(eval_batches([part], config.train.batch_size, len(part)))
        sums = document_losses(losses, tqdm(batches, unit="batch", leave=False), tokenizer.bos_id)
        starts = np.flatnonzero(windows.stream[: len(part) * config.data.seq_len] == tokenizer.bos_id)
        for start, row in zip(starts, sums, strict=True):
            title = tokenizer.decode(windows.stream[start : start + 16])
            print_row(*row, repr(title[:40]))
        print_row(*sums.sum(0), "all of them")


def print_row(loss: float, tokens: float, name: str) -> None:
    mean = loss / max(tokens, 1)
    print(f"{tokens:>10,.0f}  {mean:>14.4f}  {np.exp(mean):>10.2f}  {name}")


if __name__ == "__main__":
    app.run(main)
