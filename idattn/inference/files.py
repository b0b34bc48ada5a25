"""Weights and contexts as safetensors files, each with what it takes to use it and to refuse it elsewhere."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError
from safetensors.flax import load, save

from idattn.config import Config, from_config_dict
from idattn.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from idattn.files import read_json, resolve_path, write_atomic
from idattn.inference.card import model_card
from idattn.inference.decoder import Context, Decoder
from idattn.inference.hub import CARD
from idattn.inference.names import current_names, differences, leaf_name, named_leaves
from idattn.nn import LanguageModel

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_weights(
    folder: epath.PathLike,
    config: Config,
    params: Any,
    step: int,
    tokenizer: Tokenizer | None = None,
    val_loss: float | None = None,
) -> None:
    """Write `model.safetensors` (names as `groups.block_0.mlp.up.weight`, layers stacked), its config and tokenizer.

    The files are `model.safetensors`, `config.json`, those of the tokenizer, and a model card, `README.md`.

    Args:
      folder: of a disk or gs://BUCKET/FOLDER, made if it does not exist; an export that is there is replaced.
      config: of the run.
      params: nested dicts of arrays, as of `idattn.train.checkpoint.load_params`.
      step: optimiser steps that the weights have seen.
      tokenizer: of the model, whose files are written too; None for that of `config.data.tokenizer`.
      val_loss: of these weights for the card, in nats per token; None where it was not measured.
    """
    folder = resolve_path(folder)
    tokenizer = load_tokenizer(config.data.tokenizer) if tokenizer is None else tokenizer
    save_tokenizer(tokenizer, folder)
    write_atomic(folder / CARD, model_card(config, params, step, tokenizer, val_loss))
    write_atomic(folder / WEIGHTS, save(named_leaves(params), {"step": str(step)}))
    write_atomic(folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=2))


def load_weights(folder: epath.PathLike) -> tuple[Config, Any, int]:
    """The config, parameters as nested dicts, and step in the folder of an export.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the arrays are not those of the config's model.
    """
    folder = resolve_path(folder)
    config = from_config_dict(read_json(folder / CONFIG, "Export the checkpoint again."))
    arrays, metadata = _read(folder / WEIGHTS)
    step = int(metadata["step"])
    wanted = abstract_params(config)
    names = current_names(arrays, named_leaves(wanted))
    arrays = {names[name]: array for name, array in arrays.items()}
    shapes = ({name: str(x.shape) for name, x in leaves.items()} for leaves in (arrays, named_leaves(wanted)))
    if differing := differences(*shapes):
        raise ValueError(
            f"{folder / WEIGHTS} holds other arrays than the model of {folder / CONFIG}, {len(differing)} of them "
            f"({'; '.join(differing[:3])}). Put the two files of one export together."
        )
    return config, jax.tree.map_with_path(lambda path, _: arrays[leaf_name(path)], wanted), step


def abstract_params(config: Config) -> Any:
    """The parameters of a config's model as nested dicts of jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(nnx.state(LanguageModel.abstract(config.model), nnx.Param))


def save_context(path: epath.PathLike, context: Context, decoder: Decoder) -> None:
    """Write a context. Its size does not depend on the prompt, but for the caches of softmax layers.

    Args:
      path: of the file, which is replaced; missing folders are made.
      context: of `decoder`; it stays valid.
      decoder: whose model the file will belong to.
    """
    context = decoder.resize(context, int(np.max(np.asarray(context.length))))
    write_atomic(path, save(named_leaves(context._asdict()), {"model": fingerprint(decoder)}))


def load_context(path: epath.PathLike, decoder: Decoder) -> Context:
    """The context in a file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another model, or of other weights of it.
    """
    if not resolve_path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file that `save_context` wrote.")
    arrays, metadata = _read(resolve_path(path))
    stored, wanted = metadata.get("model"), fingerprint(decoder)
    if stored != wanted:
        raise ValueError(
            f"{path} was written by the model {stored}, this one is {wanted}: another config or other weights. "
            "Read the prompt again with this model."
        )
    rows, room = arrays["length"].shape[0], int(jnp.max(arrays["length"]))
    like = jax.eval_shape(lambda: decoder.start(rows, room))
    paths, structure = jax.tree.flatten_with_path(like._asdict())
    # In the dtype that this decoder stores states in.
    values = [arrays[leaf_name(path)].astype(x.dtype) for path, x in paths]
    return decoder.fork(Context(**jax.tree.unflatten(structure, values)), range(rows))  # places them as it needs them


def fingerprint(decoder: Decoder) -> str:
    """A name of the model and its weights: a digest of the config and of 64 numbers of every parameter."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(decoder.config), sort_keys=True).encode())
    for name, x in sorted(named_leaves(decoder.params).items()):
        sample = np.asarray(x.reshape(-1)[:64].astype(jnp.bfloat16))  # whatever this decoder computes in
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def _read(path: epath.Path) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The arrays of a safetensors file of a disk or bucket, and its metadata."""
    data = path.read_bytes()
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Write it again.") from error
    size = int.from_bytes(data[:8], "little")  # of the header, which follows
    return arrays, json.loads(data[8 : 8 + size]).get("__metadata__", {})
