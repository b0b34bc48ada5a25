"""Weights and contexts as safetensors files, each with what it takes to use it and to refuse it elsewhere."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.flax import load_file, save_file

from idattn.config import Config, from_config_dict
from idattn.inference.decoder import Context, Decoder
from idattn.inference.names import current_names, differences, leaf_name, named_leaves
from idattn.nn import LanguageModel

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_weights(folder: str | Path, config: Config, params: Any, step: int) -> None:
    """Write `model.safetensors` (names as `groups.block_0.mlp.up.weight`, layers stacked) and `config.json`.

    Args:
      folder: made if it does not exist; an export that is there is replaced.
      config: of the run.
      params: nested dicts of arrays, as of `idattn.train.checkpoint.load_params`.
      step: optimiser steps that the weights have seen.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_leaves(params), folder / WEIGHTS, metadata={"step": str(step)})
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2))


def load_weights(folder: str | Path) -> tuple[Config, Any, int]:
    """The config, parameters as nested dicts, and step of such a folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the arrays are not those of the config's model.
    """
    folder = Path(folder)
    config = from_config_dict(json.loads((folder / CONFIG).read_text()))
    arrays = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, "numpy") as file:
        step = int(file.metadata()["step"])
    wanted = abstract_params(config)
    names = current_names(arrays, named_leaves(wanted))
    arrays = {names[name]: array for name, array in arrays.items()}
    shapes = ({name: str(x.shape) for name, x in leaves.items()} for leaves in (arrays, named_leaves(wanted)))
    if found := differences(*shapes):
        raise ValueError(
            f"{folder / WEIGHTS} holds other arrays than the model of {folder / CONFIG}, {len(found)} of them "
            f"({'; '.join(found[:3])}). Put the two files of one export together."
        )
    return config, jax.tree.map_with_path(lambda path, _: arrays[leaf_name(path)], wanted), step


def abstract_params(config: Config) -> Any:
    """The parameters of a config's model as nested dicts of jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(nnx.state(LanguageModel.abstract(config.model), nnx.Param))


def save_context(path: str | Path, context: Context, decoder: Decoder) -> None:
    """Write a context: of any prompt, as large as of one token, but for the caches of softmax layers.

    Args:
      path: of the file, which is replaced; its folder must exist.
      context: of `decoder`; it is kept.
      decoder: whose model the file will belong to.
    """
    context = decoder.resize(context, int(np.max(np.asarray(context.length))))
    save_file(named_leaves(context._asdict()), path, metadata={"model": fingerprint(decoder)})


def load_context(path: str | Path, decoder: Decoder) -> Context:
    """The context in a file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of another model, or of other weights of it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file that `save_context` wrote.")
    with safe_open(path, "numpy") as file:
        stored = (file.metadata() or {}).get("model")
    wanted = fingerprint(decoder)
    if stored != wanted:
        raise ValueError(
            f"{path} was written by the model {stored}, this one is {wanted}: another config or other weights. "
            "Read the prompt again with this model."
        )
    arrays = load_file(path)
    rows, room = arrays["length"].shape[0], int(jnp.max(arrays["length"]))
    like = jax.eval_shape(lambda: decoder.start(rows, room))
    paths, structure = jax.tree.flatten_with_path(like._asdict())
    values = [
        arrays[leaf_name(path)].astype(x.dtype) for path, x in paths
    ]  # the dtype that this decoder keeps states in
    return decoder.fork(Context(**jax.tree.unflatten(structure, values)), range(rows))  # places them as it needs them


def fingerprint(decoder: Decoder) -> str:
    """A name of the model and its weights: a digest of the config and of some numbers of every parameter."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(decoder.config), sort_keys=True).encode())
    for name, x in sorted(named_leaves(decoder.params).items()):
        if not name.endswith(".discrete"):  # which is made of the others, not everywhere with the same rounding
            some = np.asarray(x.reshape(-1)[:64].astype(jnp.bfloat16))  # whatever this decoder computes in
            digest.update(name.encode() + some.tobytes())
    return digest.hexdigest()[:16]
