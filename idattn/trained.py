"""A trained model, ready to use, from one call."""

from typing import Any, NamedTuple

from etils import epath
from flax import nnx

from idattn.config import Config
from idattn.data import Tokenizer
from idattn.inference import Decoder
from idattn.nn import LanguageModel
from idattn.sharding import check_divides, current_mesh
from idattn.train.checkpoint import checkpoint_tokenizer, load_params


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      decoder: reads, scores and continues tokens.
      tokenizer: of the text that it was trained on.
      config: of the run.
      step: optimiser steps that the weights have seen.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    config: Config
    step: int


def load(checkpoint: epath.PathLike, *, which: str | int = "latest", tokenizer: str = "", **settings: Any) -> Trained:
    """The model of a checkpoint, with its tokenizer and config.

    Args:
      checkpoint: folder of a run, of one of its checkpoints, or of exported weights; gs://BUCKET/FOLDER too; or
        hf:OWNER/NAME, exported weights on the Hugging Face hub.
      which: "latest", "best" (lowest validation loss) or a step of the run; ignored for one checkpoint.
      tokenizer: another copy of the checkpoint's tokenizer, as `idattn.data.load_tokenizer` takes it; empty for the
        one that the checkpoint contains.
      settings: of `idattn.inference.Decoder`: chunk_size, block_size, state_dtype.

    Raises:
      ConnectionError: the hub is out of reach, has no such repository or does not let you in.
      FileNotFoundError: there is no such checkpoint, or an older one's tokenizer is not where its config says.
      ValueError: the checkpoint is damaged, `tokenizer` is not the checkpoint's, a setting breaks its rule, or the
        current mesh does not divide the model.
    """
    config, params, step = load_params(checkpoint, which)
    return assemble(config, params, step, checkpoint_tokenizer(checkpoint, config, which, tokenizer), **settings)


def assemble(config: Config, params: Any, step: int, tokenizer: Tokenizer, **settings: Any) -> Trained:
    """The model of what `load_params` and `checkpoint_tokenizer` return; settings and errors as in `load`."""
    if mesh := current_mesh():
        check_divides(config, mesh)
    model = nnx.merge(nnx.graphdef(LanguageModel.abstract(config.model, config.compute)), params)
    decoder = Decoder(model, trained_length=config.data.seq_len, **settings)
    return Trained(decoder, tokenizer, config, step)
