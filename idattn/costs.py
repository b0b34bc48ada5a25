"""What a model costs: parameters, states, bytes and floating-point operations, from its shapes alone.

Operations are those of the mathematics, whatever backend computes it: two per multiplication with addition, causal
softmax attention halved, a backward pass twice its forward pass, element-wise work not counted.
"""

import math
from collections import Counter
from typing import Any

import jax
from flax import nnx

from idattn.choices import find_mixer
from idattn.config import ComputeConfig, Config, ModelConfig
from idattn.nn import LanguageModel


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """The number of parameters by part, and `total`, from the shapes of the real module."""
    model = LanguageModel.abstract(config)
    parts: Counter[str] = Counter()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = str(path[2] if path[0] == "groups" else path[0])  # groups, block_i, part of the block, ...
        parts["norms" if "norm" in part else part] += math.prod(leaf.shape)
    return {"total": sum(parts.values())} | dict(sorted(parts.items()))


def state_size(config: ModelConfig, mixer: str, context: int) -> int:
    """Real numbers in the state of one layer for a sequence, without convolution tails (table 5)."""
    return find_mixer(mixer).state_size(config, context)


def forward_flops_per_token(config: ModelConfig, context: int) -> int:
    """Operations of a forward pass per token of sequences of `context` tokens."""
    D, F = config.model_dim, config.mlp_dim
    repeats = config.num_layers // len(config.mixers)
    layers = sum(find_mixer(name).flops(config, context) for name in config.mixers) * repeats
    return layers + config.num_layers * 6 * D * F + 2 * D * config.vocab_size


def decode_bytes(config: ModelConfig, batch_size: int, context: int, *, dtype: str, state_dtype: str) -> int:
    """Bytes that one token of every row must move: weights once, states read and written, keys and values read.

    Args:
      config: the model; its input embedding, of which a row is read, does not count.
      batch_size: rows.
      context: tokens before.
      dtype: of the matrices, keys and values; other parameters are float32.
      state_dtype: of the SSM states.
    """
    model = LanguageModel.abstract(config, ComputeConfig(dtype=dtype))
    width, state_width = (jax.numpy.dtype(name).itemsize for name in (dtype, state_dtype))
    params = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Variable))
    weights = sum(math.prod(x.shape) * (width if x.get_metadata().get("group") == "matrix" else 4) for x in params)
    weights -= config.vocab_size * config.model_dim * width
    states = sum(
        # A cache is read, and written only at the new token; a state of fixed size is read and written.
        state_size(config, name, context + 1) * width
        if find_mixer(name).grows
        else 2 * state_size(config, name, context) * state_width
        for name in config.mixers
    )
    return weights + batch_size * states * (config.num_layers // len(config.mixers))


def training_flops_per_token(config: ModelConfig, context: int) -> int:
    """Operations of a forward and a backward pass per token: three times the forward pass."""
    return 3 * forward_flops_per_token(config, context)


def describe(config: Config) -> dict[str, Any]:
    """All costs of a run's model as a JSON-ready dictionary; contexts are the run's sequence length."""
    model, context = config.model, config.data.seq_len
    parameters = count_parameters(model)
    sizes = {mixer: state_size(model, mixer, context) for mixer in model.mixers}
    repeats = model.num_layers // len(model.mixers)
    return {
        "parameters": parameters["total"],
        "parameters_by_part": {name: count for name, count in parameters.items() if name != "total"},
        "context": context,
        "state_size_per_layer": sizes,
        "forward_flops_per_token": forward_flops_per_token(model, context),
        "training_flops_per_token": training_flops_per_token(model, context),
        "training_tokens": config.train.steps * config.train.batch_size * context,
        "bytes": {
            "parameters": 4 * parameters["total"],
            "optimiser": 4 * (2 * parameters["total"] - _single_moments(config)),
            "state_per_sequence": sum(
                size * repeats * (jax.numpy.dtype(config.compute.dtype).itemsize if find_mixer(mixer).grows else 4)
                for mixer, size in ((mixer, sizes[mixer]) for mixer in model.mixers)
            ),
        },
    }


def _single_moments(config: Config) -> int:
    """Parameters of which the optimiser stores one moment, not two: with Muon, the layers' matrices."""
    layers = nnx.state(LanguageModel.abstract(config.model).groups, nnx.Param)
    matrices = [x for _, x in nnx.to_flat_state(layers) if x.get_metadata().get("group") == "matrix"]
    return sum(math.prod(x.shape) for x in matrices) if config.optim.name == "muon" else 0
