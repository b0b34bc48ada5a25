"""What a model costs: parameters, states, bytes and floating-point operations, from its shapes alone.

Operations are those of the mathematics, whatever backend computes it: two per multiplication with addition, causal
softmax attention halved, a backward pass twice its forward pass, element-wise work not counted.
"""

import math
from collections import Counter
from typing import Any

import jax
from flax import nnx

from idattn.config import MIXERS, ComputeConfig, Config, ModelConfig
from idattn.nn import LanguageModel
from idattn.nn.layers import MatrixParam


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """The number of parameters by part, and `total`, from the shapes of the real module."""
    model = LanguageModel.abstract(config)
    parts: Counter[str] = Counter()
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        part = path[2] if path[0] == "groups" else path[0]  # groups, block_i, part of the block, ...
        parts["norms" if "norm" in part else part] += math.prod(leaf.shape)
    return {"total": sum(parts.values())} | dict(sorted(parts.items()))


def state_size(config: ModelConfig, mixer: str, context: int) -> int:
    """Real numbers that one layer carries from token to token for a sequence, without convolution tails (table 5)."""
    if MIXERS[mixer].softmax:
        return 2 * config.model_dim * context
    if MIXERS[mixer].ideal:
        return config.num_heads * config.ssm.num_modes * (config.ideal.num_features + config.head_dim)
    return config.num_kv_heads * 2 * config.ssm.num_modes * 2 * config.head_dim


def forward_flops_per_token(config: ModelConfig, context: int) -> int:
    """Operations of a forward pass per token of sequences of `context` tokens."""
    D, F = config.model_dim, config.mlp_dim
    repeats = config.num_layers // len(config.mixers)
    layers = sum(_mixer_flops(config, mixer, context) for mixer in config.mixers) * repeats
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
    weights = sum(math.prod(x.shape) * (width if isinstance(x, MatrixParam) else 4) for x in params)
    weights -= config.vocab_size * config.model_dim * width
    states = sum(
        state_size(config, name, context + 1) * width
        if MIXERS[name].softmax
        else 2 * state_size(config, name, 0) * state_width
        for name in config.mixers
    )
    return weights + batch_size * states * (config.num_layers // len(config.mixers))


def training_flops_per_token(config: ModelConfig, context: int) -> int:
    """Operations of a forward and a backward pass per token: three times the forward pass."""
    return 3 * forward_flops_per_token(config, context)


def _mixer_flops(config: ModelConfig, mixer: str, context: int) -> int:
    kind, ssm = MIXERS[mixer], config.ssm
    D, H, G, R, M = config.model_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.ssm.num_modes
    if kind.softmax:
        return 8 * D**2 + 2 * D * context  # projections; scores and weighted values over half the context
    if kind.ideal:
        features, width = config.ideal.num_features, config.ideal.num_features + R
        frequencies = features // 2 if config.ideal.features == "fourier" else features
        core = 4 * R * frequencies + 2 * M**2 * width + 2 * M * width  # both features, update, read
        return 8 * D**2 + H * core + 2 * M**3  # and the change of coefficients, one for all heads
    width = D if kind.query_readout else 2 * D  # of what the output projection reads
    narrow = G * R  # of the inputs of the state
    projections = 2 * D * (2 * narrow + width + (D if kind.query_readout else 0) + (width if ssm.output_gate else 0))
    convolved = narrow * (1 if kind.feature_map else 2) + (D if kind.query_readout else 0)
    # Complex decay of the state and input of [k, v]: 6 + 4 real operations for each of M (R + E) numbers.
    update = G * 10 * M * 2 * R
    if kind.query_readout:  # y = X_k q, w = C^T f(C y) with the product of the two matrices, o = Re(w^T X_v)
        read = H * (4 * M * R + {"full": 8 * M**2, "diagonal": 8 * M, "identity": 0}[ssm.c] + 4 * M * R)
    else:
        read = H * 4 * M * 2 * R
    return projections + 2 * ssm.conv_width * convolved + update + read


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
            "optimiser": 8 * parameters["total"],
            "state_per_sequence": sum(
                size * repeats * (jax.numpy.dtype(config.compute.dtype).itemsize if MIXERS[mixer].softmax else 4)
                for mixer, size in ((mixer, sizes[mixer]) for mixer in model.mixers)
            ),
        },
    }
