"""From a checkpoint to a model in one call, and the names of the package."""

import jax
import numpy as np
import pytest
from flax import nnx
from support.models import export_model

import idattn
from idattn.config import ComputeConfig, ModelConfig
from idattn.inference import generate_text, load_weights, right_pad
from idattn.nn import LanguageModel


def test_load(tmp_path):
    decoder, tokenizer, config, step = idattn.load(export_model(tmp_path), chunk_size=8)
    stored, params, _ = load_weights(tmp_path)
    assert (step, config, decoder.chunk_size, decoder.trained_length) == (7, stored, 8, 16)
    tokens = np.asarray(tokenizer.encode("ab says"), np.int32)
    model = nnx.merge(nnx.graphdef(LanguageModel.abstract(config.model, config.compute)), params)
    context = decoder.prefill(*right_pad([tokens]))
    np.testing.assert_allclose(context.hidden, model.hidden(tokens[None])[0][:, -1], rtol=1e-5, atol=1e-6)
    (completion,) = idattn.generate_text(decoder, tokenizer, ["ab"], 5, temperature=0.0)
    assert idattn.generate_text is generate_text and len(completion.tokens) == 5
    with pytest.raises(FileNotFoundError, match="does not exist"):
        idattn.load(tmp_path / "none")


def test_abstract():
    """The shapes and dtypes of a model that is made, in the settings given."""
    config, compute = ModelConfig.tiny("softmax", "s4d"), ComputeConfig(dtype="float32")
    model, made = LanguageModel.abstract(config, compute), LanguageModel(config, compute, rngs=nnx.Rngs(0))
    assert model.compute == compute and LanguageModel.abstract(config).compute == ComputeConfig()
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(nnx.state(x, nnx.Param))) for x in (model, made)
    ]
    assert shapes[0] == shapes[1]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_names():
    assert all(getattr(idattn, name).__name__ == name for name in idattn.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        idattn.lod  # noqa: B018
