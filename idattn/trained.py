"""A trained model, ready to use, from one call."""

from typing import Any, NamedTuple

from etils import epath
from flax import nnx

from idattn.config import Config
from idattn.data import Tokenizer, load_tokenizer
from idattn.inference import Decoder
from idattn.nn import LanguageModel
from idattn.train.checkpoint import load_params


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


def load(checkpoint: epath.PathLike, *, which: str | int = "latest", **settings: Any) -> Trained:
    """The model of a checkpoint, with its tokenizer and config.

    Args:
      checkpoint: folder of a run, of one of its checkpoints, or of exported weights; gs://BUCKET/FOLDER too.
      which: "latest", "best" (lowest validation loss) or a step of the run; ignored for one checkpoint.
      settings: of `idattn.inference.Decoder`: chunk_size, block_size, state_dtype.

    Raises:
      FileNotFoundError: there is no such checkpoint, or its tokenizer's file is missing.
      ValueError: the checkpoint is damaged, or a setting breaks its rule.
    """
    return assemble(*load_params(checkpoint, which), **settings)


def assemble(config: Config, params: Any, step: int, **settings: Any) -> Trained:
    """The model of what `idattn.train.checkpoint.load_params` returns; settings as in `load`."""
    model = nnx.merge(nnx.graphdef(LanguageModel.abstract(config.model, config.compute)), params)
    decoder = Decoder(model, trained_length=config.data.seq_len, **settings)
    return Trained(decoder, load_tokenizer(config.data.tokenizer), config, step)
