"""Small random models, and what they say of whole sequences."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from idattn.config import ComputeConfig, DataConfig, ModelConfig, SSMConfig, quickstart
from idattn.inference import save_weights
from idattn.nn import LanguageModel

V = 64
HYBRID = ("interdomain", "softmax", "s4d")
MIXERS = [
    ("interdomain",), ("softmax",), ("s4d",), ("single_query",), ("dual_linear",), ("ideal",),
    ("gla", "mamba2", "gated_deltanet"), ("softmax_conv", "linear"),
]  # fmt: skip


def make_model(*mixers, **options):
    """A model whose next token depends strongly on what came before; each caller has its own."""
    return nnx.clone(_make_model(jax.devices()[0], jax.sharding.get_abstract_mesh(), *mixers, **options))


@functools.cache
def _make_model(_device, _mesh, *mixers, seed=3, **changes):  # whose arrays are there
    values = dict(
        vocab_size=V, model_dim=16, num_heads=4, mlp_dim=24, num_layers=len(mixers), init_std=1.0,
        ssm=SSMConfig(num_modes=5, c_init_scale=16.0, delta_min=0.5, delta_max=1.0),
    )  # fmt: skip
    config = ModelConfig.tiny(*mixers, **(values | changes))
    compute = ComputeConfig(dtype="float32", chunk_size=4)
    return nnx.jit(lambda: LanguageModel(config, compute, rngs=nnx.Rngs(seed)))()


def run_of(model):
    """The config of a run of a model over bytes."""
    return dataclasses.replace(quickstart(), model=model, data=DataConfig(seq_len=16))


def export_model(folder):
    """The weights of a random byte model as `launch` reads them, of step 7 and windows of 16 tokens; its folder."""
    model = make_model("s4d", vocab_size=257)
    save_weights(folder, run_of(model.config), nnx.to_pure_dict(nnx.state(model, nnx.Param)), 7)
    return folder


@nnx.jit
def forward(model, tokens):
    return model(tokens)[0]


def next_logits(model, row, length=48):
    """The logits (T, V) after every token of one row, from one pass over all of it."""
    padded = np.zeros((1, length), np.int32)  # zeros at the end, which causality hides
    padded[0, : len(row)] = row
    return np.asarray(forward(model, padded)[0, : len(row)])


def next_log_probs(model, row, length=48):
    """Likewise the log-probabilities."""
    return np.asarray(jax.nn.log_softmax(next_logits(model, row, length), axis=-1))
