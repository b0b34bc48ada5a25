"""Weights and contexts on disk: what was saved comes back, and what does not belong together is refused."""

import json
import os
import re

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from support.models import V, export_model, make_model, run_of

from idattn.inference import Decoder, load_context, load_weights, save_context, save_weights
from idattn.nn import LanguageModel
from idattn.train.checkpoint import load_params

PATTERN = ("interdomain", "softmax")
TOKENS = np.random.default_rng(0).integers(0, V, (2, 9))


@pytest.fixture(scope="module")
def decoder():
    return Decoder(make_model(*PATTERN), chunk_size=16, block_size=4)


def test_a_context_goes_on_where_it_was_saved(decoder, tmp_path):
    context = decoder.prefill(TOKENS, [9, 4], max_tokens=50)
    save_context(tmp_path / "short", context, decoder)
    restored = load_context(tmp_path / "short", decoder)
    settings = decoder.sampling(2, seed=3)
    ours, theirs = (decoder.decode(c, settings)[0] for c in (restored, context))
    np.testing.assert_array_equal(ours, theirs)
    rounding = Decoder(make_model(*PATTERN), chunk_size=16, state_dtype="bfloat16")
    assert load_context(tmp_path / "short", rounding).state.memories[0].state.dtype == "bfloat16"


def test_a_file_is_as_large_for_any_prompt(tmp_path):
    decoder = Decoder(make_model("s4d"), chunk_size=16)
    sizes = []
    for n in (1, 9):
        save_context(tmp_path / str(n), decoder.prefill(TOKENS[:, :n]), decoder)
        sizes.append((tmp_path / str(n)).stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("other", [dict(seed=4), dict(mlp_dim=20)], ids=str)
def test_a_context_of_another_model_is_refused(decoder, tmp_path, other):
    save_context(tmp_path / "context", decoder.prefill(TOKENS), decoder)
    with pytest.raises(ValueError, match="another config or other weights. Read the prompt again"):
        load_context(tmp_path / "context", Decoder(make_model(*PATTERN, **other)))
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_context(tmp_path / "nothing", decoder)


def test_weights_come_back_and_must_fit_their_config(tmp_path):
    model = make_model(*PATTERN)
    config = run_of(model.config)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    save_weights(tmp_path, config, params, 70)
    for load in (load_weights, load_params):  # whatever takes a checkpoint takes an export
        stored, loaded, step = load(tmp_path)
        assert (stored, step) == (config, 70)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
    structure = nnx.graphdef(LanguageModel.abstract(config.model))
    assert nnx.merge(structure, loaded).hidden(TOKENS)[0].shape == (2, 9, 16)
    values = json.loads((tmp_path / "config.json").read_text())
    values["model"]["mlp_dim"] = 40
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"groups\.block_0\.mlp\.down\.weight: \(1, 24, 16\) stored, \(1, 40, 16\) wanted"
    ):
        load_weights(tmp_path)


def test_what_is_written_may_be_read_by_whom_the_umask_allows(decoder, tmp_path):
    config = run_of(decoder.config)
    params = nnx.to_pure_dict(nnx.state(make_model(*PATTERN), nnx.Param))
    before = os.umask(0o027)
    try:
        save_weights(tmp_path / "new" / "export", config, params, 1)
        save_context(tmp_path / "context", decoder.prefill(TOKENS), decoder)
    finally:
        os.umask(before)
    files = [*(tmp_path / "new" / "export").iterdir(), tmp_path / "context"]
    assert len(files) >= 3 and {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}


def test_an_export_has_a_model_card(tmp_path):
    """Its metadata is YAML, its table says what the weights are, and its example loads them."""
    path = export_model(tmp_path) / "README.md"
    _, metadata, text = path.read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "idattn"
    config, params, step = load_weights(tmp_path)
    assert f"# s4d, {sum(x.size for x in jax.tree.leaves(params)):,} parameters\n" in text
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    tokens = config.train.batch_size * 16
    assert rows["tokens"] == f"{7 * tokens}: 7 steps of {tokens}, in windows of 16"
    assert rows["tokenizer"] == "257 ids, fingerprint `bytes`" and rows["validation loss"] == "not measured"
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example.replace("FOLDER", str(tmp_path)).replace("num_tokens=100", "num_tokens=2"), names)
    assert names["step"] == step and len(names["completion"].tokens) == 2


@pytest.mark.parametrize("text", ["", '{"seed": 4', "\0" * 9, "[]"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*\)\. Export the checkpoint again"):
        load_weights(tmp_path)
