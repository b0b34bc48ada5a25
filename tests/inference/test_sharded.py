"""Reading and writing on a mesh, rows over data and heads over tensor, is what one device does."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support.helpers import assert_close, defined_flags, run_main
from support.models import HYBRID, MIXERS, V, make_model, run_of

from idattn.cli import generate
from idattn.config import MeshConfig, ModelConfig
from idattn.inference import Decoder, load_context, save_context, save_weights
from idattn.sharding import make_mesh
from idattn.trained import assemble

pytestmark = pytest.mark.usefixtures("eight_devices")
B, T = 4, 11
TOKENS = np.random.default_rng(0).integers(0, V, (B, T))
LENGTHS = np.array([11, 3, 7, 8])


def run(model, path):
    """Scores, the context after the prompt, tokens written from a file of it and from a fork, and the decoder."""
    decoder = Decoder(model, chunk_size=16, block_size=4)
    log_probs, _, context = decoder.score(TOKENS, LENGTHS)
    save_context(path, context, decoder)
    outputs = [jax.tree.map(np.asarray, context)]
    for start in (decoder.fork(context, range(B)), load_context(path, decoder)):
        tokens, after, _ = decoder.decode(start, decoder.sampling(B, seed=np.arange(B) // 2, top_p=0.9))
        outputs += [tokens, jax.tree.map(np.asarray, after)]
    return log_probs, outputs, context, decoder


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [HYBRID, *MIXERS], ids="+".join)
def test_a_mesh_changes_nothing(mixers, tmp_path):
    model = make_model(*mixers)
    expected, outputs, *_ = run(model, tmp_path / "one")
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with jax.set_mesh(mesh):
        actual, sharded, context, decoder = run(model, tmp_path / "mesh")
    assert_close(actual, expected, "float32", reduction=T * 16)
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(outputs), strict=True):
        assert_close(ours, theirs, "float32", reduction=T * 16)
    up = decoder.params["groups"]["block_0"]["mlp"]["up"]["weight"]
    state = jax.tree.leaves(context.state.memories[0])[0]
    assert up.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")), 3)
    assert state.sharding.shard_shape(state.shape)[1:3] == (2, 1)  # rows and heads, (layers, B, G, ...)
    assert decoder._decode._cache_size() == 1


def test_the_program_takes_as_many_devices_as_it_is_told(tmp_path, monkeypatch, capsys):
    model = make_model("s4d", vocab_size=264)
    save_weights(tmp_path, run_of(model.config), nnx.to_pure_dict(nnx.state(model, nnx.Param)), 7)

    load, meshes = generate.load, []

    def recorded_load(*arguments, **settings):
        meshes.append(jax.sharding.get_abstract_mesh())
        return load(*arguments, **settings)

    monkeypatch.setattr(generate, "load", recorded_load)

    def written(tensor):
        run_main(generate, f"--checkpoint={tmp_path}", "--prompt=ab", "--num_tokens=4", f"--tensor={tensor}")
        return capsys.readouterr().out

    with defined_flags(generate):
        assert written(2) == written(1)
        assert (meshes[0].size, meshes[1].empty) == (2, True)
        with pytest.raises(ValueError, match="--tensor=9 must be at most the 8 devices"):
            written(9)


def test_tokens_are_not_split():
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=8))),
        pytest.raises(NotImplementedError, match=r"mesh\.sequence=1"),
    ):
        Decoder(make_model("s4d"))


def test_a_vocabulary_that_devices_do_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"mesh\.tensor=2 must divide model\.vocab_size=37"):
        assemble(run_of(ModelConfig.tiny()), None, 0, None)
