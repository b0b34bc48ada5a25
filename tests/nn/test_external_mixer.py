"""A mixer outside the package trains, decodes, shards and is counted, by the contract alone; others are refused."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from support.helpers import assert_close
from support.models import make_model, next_log_probs
from support.moving_average import DECAY, MovingAverage
from support.runs import make_config

from idattn.choices import find_mixer
from idattn.config import ComputeConfig, MeshConfig, ModelConfig, from_config_dict
from idattn.costs import count_parameters, describe
from idattn.inference import Decoder
from idattn.nn import Mixer
from idattn.sharding import local_rows, make_mesh, place
from idattn.train.step import Trainer

NAME = "support.moving_average:MovingAverage"


def test_it_is_what_it_says():
    config = ModelConfig.tiny(NAME)
    mixer = MovingAverage(config, residual_std=1.0, compute=ComputeConfig(), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 5, 12)).astype(np.float32)
    y, state = nnx.jit(lambda mixer, x: mixer(x))(mixer, x)
    decays = np.tril(DECAY ** np.maximum(np.subtract.outer(np.arange(5), np.arange(5)), 0))
    assert_close(y[0], decays @ x[0] @ np.asarray(mixer.weight[...]), "float32", reduction=60)
    np.testing.assert_array_equal(state.position, [5])


def test_it_decodes():
    model = make_model(NAME, "interdomain")
    decoder = Decoder(model, block_size=4)
    prompt = np.arange(7)[None] % 64
    context = decoder.prefill(prompt)
    tokens, context, _ = decoder.decode(context, decoder.sampling(1, temperature=0.0))
    row = np.concatenate([prompt[0], tokens[0]])
    expected = next_log_probs(model, row)[6:10].argmax(axis=-1)
    np.testing.assert_array_equal(tokens[0], expected)
    log_probs, *_ = decoder.score(row[None])
    assert_close(log_probs[0, 1:], next_log_probs(model, row)[range(10), row[1:]], "float32", reduction=64)


@pytest.mark.usefixtures("eight_devices")
def test_it_trains_on_a_mesh_as_on_one_device(tmp_path):
    config = make_config(tmp_path, mixer=NAME, vocab_size=264, batch_size=8)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, model_dim=16))
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 257, (8, 16)).astype(np.int32) for name in ("inputs", "targets")}
    batch |= {"segment_ids": np.zeros((8, 16), np.int32), "loss_mask": np.ones((8, 16), np.float32)}
    results = []
    for mesh, devices in ((MeshConfig(data=1), jax.devices()[:1]), (MeshConfig(data=2, fsdp=4), None)):
        trainer = Trainer(dataclasses.replace(config, mesh=mesh), make_mesh(mesh, devices))
        placed = place(trainer.mesh, batch, local_rows(trainer.mesh, 8), 8)
        state, metrics = trainer.step(trainer.init(), placed)
        results.append((state["params"], metrics["loss"]))
    (one, loss), (sharded, sharded_loss) = results
    assert_close(sharded_loss, loss, "float32", reduction=8 * 16)
    weight = sharded["groups"]["block_0"]["mixer"]["weight"]
    assert weight.sharding.shard_shape(weight.shape) == (1, 4, 16)
    assert_close(
        weight, np.asarray(one["groups"]["block_0"]["mixer"]["weight"]), "float32", reduction=8 * 16, gradient=True
    )


def test_it_is_counted_and_kept_in_configs(tmp_path):
    config = make_config(tmp_path, mixer=NAME)
    assert from_config_dict(dataclasses.asdict(config)) == config
    D, F = config.model.model_dim, config.model.mlp_dim
    assert count_parameters(config.model)["mixer"] == D * D
    costs = describe(config)
    assert costs["state_size_per_layer"] == {NAME: D}
    assert costs["forward_flops_per_token"] == 2 * D**2 + 6 * D * F + 2 * D * config.model.vocab_size


class Unfinished(Mixer):
    def mix(self, x, documents, memory):
        return x, memory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("interdomian", r"mixer='interdomian' is not known\. Did you mean 'interdomain'"),
        ("no_such_module:Mixer", "mixer='no_such_module:Mixer' must be one of interdomain.*No module named"),
        ("support.moving_average:Avarage", "mixer='support.moving_average:Avarage' must be one of.*has no attribute"),
        ("support.moving_average:Average", "must be a subclass of idattn.nn.Mixer"),
        (f"{__name__}:Unfinished", "must define __init__, flops, init_memory, memory_specs, state_size"),
    ],
)
def test_what_is_no_mixer_is_refused_by_name(name, message, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Unfinished=Unfinished))
    with pytest.raises(ValueError, match=message):
        find_mixer(name)
    with pytest.raises(ValueError, match=message):
        ModelConfig.tiny(name)
