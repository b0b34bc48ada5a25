"""One optimiser step: accumulation, rematerialisation, states that must not change, metrics, and overfitting."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.helpers import assert_close
from support.mixers import EACH

from idattn.config import ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from idattn.train.optim import learning_rate
from idattn.train.step import Trainer

B, T, V = 4, 12, 37


def make_config(
    *mixers,
    accumulation=1,
    remat="none",
    scan_layers=True,
    peak_lr=1e-2,
    eps=1e-8,
    backend="auto",
    skip_not_finite=0,
    **model,
):
    return Config(
        model=ModelConfig.tiny(*mixers, **model),
        data=DataConfig(seq_len=T),
        optim=OptimConfig(peak_lr=peak_lr, warmup_steps=2, eps=eps),
        train=TrainConfig(steps=50, batch_size=B, accumulation=accumulation, skip_not_finite=skip_not_finite),
        compute=ComputeConfig(
            dtype="float32", chunk_size=4, loss_chunk=16, remat=remat, scan_layers=scan_layers, backend=backend
        ),
    )


def make_batch(seed=0):
    """Random tokens in two documents a row; the rows count 12, 1, 5 and 9 targets."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < np.array([12, 1, 5, 9])[:, None]).astype(np.float32)
    return {
        "inputs": rng.integers(0, V, (B, T)).astype(np.int32),
        "targets": rng.integers(0, V, (B, T)).astype(np.int32),
        "segment_ids": np.repeat([[0] * 5 + [1] * 7], B, axis=0).astype(np.int32),
        "loss_mask": mask,
    }


def copy(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_bitwise(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def plain_loss(trainer, params, batch):
    """Mean loss of the model's logits, softmax written out, all tokens at once."""
    model = nnx.merge(trainer.graphdef, params)
    logits, _ = model(jnp.asarray(batch["inputs"]), segment_ids=jnp.asarray(batch["segment_ids"]))
    right = jnp.sum(jax.nn.one_hot(batch["targets"], V) * jax.nn.log_softmax(logits), axis=-1)
    return -jnp.sum(right * batch["loss_mask"]) / batch["loss_mask"].sum()


@pytest.fixture(scope="module")
def trainer():
    return Trainer(make_config("interdomain", peak_lr=3e-2))


def test_metrics_and_state():
    trainer = Trainer(make_config("softmax"))
    config, batch, state = trainer.config, make_batch(), trainer.init()
    params = copy(state["params"])
    loss, grads = jax.jit(jax.value_and_grad(lambda params: plain_loss(trainer, params, batch)))(params)
    state, metrics = trainer.step(state | {"step": jnp.int32(7)}, batch)
    assert set(metrics) == {"loss", "grad_norm", "learning_rate", "targets", "not_finite"}
    assert_close(metrics["loss"], loss, "float32", reduction=T, name="loss")
    assert abs(metrics["loss"] - np.log(V)) < 0.1
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads)))
    assert_close(metrics["grad_norm"], norm, "float32", reduction=B * T, gradient=True, name="grad_norm")
    assert float(metrics["targets"]) == 12 + 1 + 5 + 9
    assert int(metrics["not_finite"]) == 0
    # The schedule is that of the state's step; the update's comes from the optimiser's count, here 0.
    assert float(metrics["learning_rate"]) == pytest.approx(float(learning_rate(config.optim, 50)(7)))
    assert set(state) == {"params", "opt_state", "step", "not_finite"}
    assert (int(state["step"]), int(state["not_finite"])) == (8, 0)
    # Adam's first step moves by the rate along the sign, where the gradient is not tiny: 5e-3 for the norm's scale.
    moved = np.asarray(state["params"]["final_norm"]["scale"]) - params["final_norm"]["scale"]
    np.testing.assert_allclose(moved, -5e-3 * np.sign(grads["final_norm"]["scale"]), rtol=1e-3)


def test_compiles_once_and_loss_is_the_steps(trainer):
    """Steps from a new state and from a stepped one share a program; `loss` returns the sum and the count."""
    state, batch = trainer.init(), make_batch(1)
    total, count = trainer.loss(state["params"], batch)
    assert float(count) == 27
    first = trainer.step(state, batch)
    assert_close(first[1]["loss"], total / count, "float32", reduction=B * T)
    second = trainer.step(first[0], batch)
    assert float(second[1]["loss"]) < float(first[1]["loss"])
    assert trainer._compiled_step._cache_size() == 1


def test_float64_trains():
    with jax.enable_x64(True):
        config = make_config(backend="recurrent")
        trainer = Trainer(dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="float64")))
        state, batch = trainer.init(), make_batch()
        for _ in range(2):
            total, count = trainer.loss(state["params"], batch)
            state, metrics = trainer.step(state, batch)
            assert metrics["loss"].dtype == total.dtype == jnp.float64
            assert float(metrics["loss"]) == pytest.approx(float(total / count), rel=1e-13)


def test_abstract_state_is_that_of_init(trainer):
    state, abstract = trainer.init(), trainer.abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_seed_decides_the_parameters():
    configs = [dataclasses.replace(make_config("softmax"), seed=seed) for seed in (1, 1, 2)]
    one, again, other = (Trainer(config).init()["params"] for config in configs)
    assert_bitwise(one, again)
    assert not np.array_equal(one["embedding"], other["embedding"])


def test_accumulation_does_not_change_the_step():
    """Parts with 12, 1, 5 and 9 targets: the mean is over the batch, not over the parts' means."""
    batch, results, losses = make_batch(), {}, {}
    for parts in (4, 1):
        trainer = Trainer(make_config("softmax", accumulation=parts, eps=1e-2))  # smooth, unlike a sign
        start = trainer.init()["params"]
        losses[parts] = trainer.loss(start, batch)
        results[parts] = trainer.step(trainer.init(), batch)
        # No activation of a step or of an evaluation has more rows than a part.
        state, dim = trainer.abstract_state(), trainer.config.model.model_dim
        for program, params in ((trainer._step, state), (trainer._loss, state["params"])):
            text = str(jax.make_jaxpr(program)(params, batch))
            assert [rows for rows in (1, 4) if f"f32[{rows},{T},{dim}]" in text] == [B // parts]
    assert_close(losses[4][0], losses[1][0], "float32", reduction=B * T, name="loss of an evaluation")
    assert float(losses[4][1]) == float(losses[1][1]) == 27
    (state, metrics), (other, other_metrics) = results[1], results[4]
    for name in ("loss", "grad_norm", "targets", "learning_rate"):
        assert_close(other_metrics[name], metrics[name], "float32", reduction=B * T, gradient=True, name=name)
    assert int(other_metrics["not_finite"]) == int(other["not_finite"]) == 0
    for part in ("opt_state", "params"):
        pairs = zip(jax.tree.leaves_with_path(other[part]), jax.tree.leaves(state[part]), strict=True)
        for (path, ours), theirs in pairs:
            assert_close(ours, theirs, "float32", reduction=B * T, gradient=True, name=jax.tree_util.keystr(path))
    assert np.abs(np.asarray(state["params"]["embedding"]) - np.asarray(start["embedding"])).max() > 1e-4

    # Negative control: the mean of the parts' means is another loss.
    rows = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(B)]
    means = [total / count for total, count in (trainer.loss(start, row) for row in rows)]
    assert abs(np.mean(means) - float(metrics["loss"])) > 1e-3


def test_masked_batch_changes_nothing_but_counts_zero(trainer):
    batch = make_batch() | {"loss_mask": np.zeros((B, T), np.float32)}
    _, metrics = trainer.step(trainer.init(), batch)
    assert float(metrics["loss"]) == 0
    assert float(metrics["grad_norm"]) == 0
    assert int(metrics["not_finite"]) == 0


def poisoned(state, batch, kind):
    """The batch and the state with a NaN or infinity in one of them."""
    if kind == "batch":
        mask = np.where(np.arange(T) == 3, np.nan, batch["loss_mask"]).astype(np.float32)
        return state, batch | {"loss_mask": mask}
    value = np.nan if kind == "parameter" else np.inf
    scale = state["params"]["final_norm"]["scale"].at[2].set(value)
    return state | {"params": state["params"] | {"final_norm": {"scale": scale}}}, batch


@pytest.mark.parametrize("poison", ["batch", "parameter", "infinite parameter"])
def test_not_finite_leaves_the_state_for_good(trainer, poison):
    batch, (state, _) = make_batch(), trainer.step(trainer.init(), make_batch())
    state, bad = poisoned(state, batch, poison)
    before = copy(state)
    state, metrics = trainer.step(state, bad)
    assert not np.isfinite(float(metrics["loss"]))
    assert (int(metrics["not_finite"]), int(state["not_finite"]), int(state["step"])) == (1, 1, 1)
    for name in ("params", "opt_state"):
        assert_bitwise(state[name], before[name])

    if poison != "batch":  # cured, it must still not continue
        state["params"]["final_norm"]["scale"] = jnp.ones_like(state["params"]["final_norm"]["scale"])
        before = copy(state)
    state, metrics = trainer.step(state, batch)
    assert np.isfinite(float(metrics["loss"]))
    assert np.isfinite(float(metrics["grad_norm"]))
    assert (int(metrics["not_finite"]), int(state["not_finite"]), int(state["step"])) == (1, 1, 1)
    for name in ("params", "opt_state"):
        assert_bitwise(state[name], before[name])

    # Negative control: with the count at zero the same step does move the state.
    zero = jax.device_put(np.int32(0), state["not_finite"].sharding)  # as it is, or the step is compiled again
    state, metrics = trainer.step(state | {"not_finite": zero}, batch)
    assert int(metrics["not_finite"]) == 0
    assert not np.array_equal(state["params"]["embedding"], before["params"]["embedding"])


def test_skips_as_many_not_finite_steps_as_it_may():
    trainer = Trainer(make_config("softmax", skip_not_finite=2))
    batch, state = make_batch(), trainer.init()
    moved = []
    for good in (True, False, True, False, True, False, True):
        before = copy(state["params"]["embedding"])
        state, metrics = trainer.step(state, batch if good else poisoned(state, batch, "batch")[1])
        moved.append(not np.array_equal(state["params"]["embedding"], before))
    assert moved == [True, False, True, False, True, False, False]
    assert (int(metrics["not_finite"]), int(state["step"])) == (3, 5)


@pytest.mark.parametrize("mixer", EACH)
def test_overfits_one_batch(mixer, trainer):
    """Interdomain with the chunkwise backend; the others with the one that compiles faster."""
    batch = make_batch()
    if mixer != "interdomain":
        trainer = Trainer(make_config(mixer, peak_lr=3e-2, backend="recurrent"))
    state, losses, programs = trainer.init(), [], set()
    for _ in range(40):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
        programs.add(trainer._compiled_step._cache_size())
    assert int(metrics["not_finite"]) == 0
    assert abs(losses[0] - np.log(V)) < 0.1
    assert losses[-1] < 1.0
    assert len(programs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "scan_layers"), [("mixer", True), ("dots", True), ("block", True), ("none", False), ("block", False)]
)
def test_remat_same_numbers(remat, scan_layers):
    batch = make_batch()
    options = dict(remat="none"), dict(remat=remat, scan_layers=scan_layers)
    trainers = [Trainer(make_config("interdomain", eps=1e-2, **x)) for x in options]
    (state, metrics), (again, again_metrics) = (trainer.step(trainer.init(), batch) for trainer in trainers)
    for name, value in metrics.items():
        assert_close(again_metrics[name], value, "float32", reduction=B * T, gradient=True, name=name)
    pairs = zip(jax.tree.leaves_with_path(again), jax.tree.leaves(state), strict=True)
    for (path, ours), theirs in pairs:
        assert_close(ours, theirs, "float32", reduction=B * T, gradient=True, name=jax.tree_util.keystr(path))
    programs = [str(jax.make_jaxpr(trainer._step)(trainer.abstract_state(), batch)) for trainer in trainers]
    counts = [len(re.findall(r"\b(remat2?|checkpoint)\[", program)) for program in programs]
    assert counts[0] == 0 and (counts[1] > 0) == (remat != "none")


@pytest.mark.slow
def test_remat_saves_memory(optimised):
    """Six softmax layers of 128 tokens: the attention weights of one layer at a time rather than of all."""
    sizes = {}
    for remat in ("none", "dots", "mixer", "block"):
        config = make_config("softmax", remat=remat, num_layers=6)
        trainer = Trainer(config)
        batch = {name: jax.ShapeDtypeStruct((B, 128), x.dtype) for name, x in make_batch().items()}
        compiled = trainer._compiled_step.lower(trainer.abstract_state(), batch).compile()
        sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    weights = 4 * B * 2 * 128 * 128  # of one layer, float32
    assert sizes["none"] > 6 * weights
    assert sizes["none"] - sizes["dots"] > 4 * weights
    outputs = 4 * B * 128 * 12 * 5  # of the mixers but one
    assert sizes["mixer"] >= sizes["block"] + outputs
    assert sizes["dots"] >= sizes["mixer"] + 4 * outputs  # of the products before and after them
