"""From a checkpoint to a model in one call, and the names of the package."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from support.models import export_model, make_model, run_of

import idattn
from idattn.config import ComputeConfig, ModelConfig
from idattn.data import load_tokenizer, train_tokenizer
from idattn.inference import generate_text, load_weights, right_pad
from idattn.nn import LanguageModel
from idattn.train.checkpoint import Checkpoints


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


def test_load_a_checkpoint_of_a_run(tmp_path):
    """The newest, the one of the lowest loss, or that of a step: its weights, with the tokenizer that it contains."""
    model = make_model("s4d", vocab_size=257)
    config, params = run_of(model.config), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    train_tokenizer(["the cat sat on the mat " * 200], 290, tmp_path / "t.model")
    names = {1: "bytes", 2: tmp_path / "t.model", 3: "bytes"}
    tokenizers = {step: load_tokenizer(name) for step, name in names.items()}
    for step, loss in {1: 3.0, 2: 1.0, 3: 2.0}.items():
        state = {"params": jax.tree.map(lambda x, step=step: step * x, params)}
        with Checkpoints(tmp_path, keep_latest=3, keep_best=1, tokenizer=tokenizers[step]) as checkpoints:
            checkpoints.save(step, state, SimpleNamespace(get_state=dict), config, loss)
    for which, wanted in {"latest": 3, "best": 2, 1: 1}.items():
        decoder, tokenizer, stored, step = idattn.load(tmp_path, which=which)
        assert (step, stored, tokenizer.fingerprint) == (wanted, config, tokenizers[wanted].fingerprint)
        saved = jax.tree.map(lambda x, y, step=step: (step * x).astype(y.dtype), params, decoder.params)
        jax.tree.map(np.testing.assert_array_equal, decoder.params, saved)


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
