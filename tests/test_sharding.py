"""Every kind of parallelism on eight simulated devices: the numbers of one device, arrays split as they should be."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support.helpers import assert_close

from idattn.config import (
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
    from_config_dict,
)
from idattn.nn import InterdomainAttention, LanguageModel
from idattn.sharding import check_divides, local_rows, make_mesh, on_shards, place, spec
from idattn.train.step import Trainer

pytestmark = pytest.mark.usefixtures("eight_devices")
B, T, V = 8, 16, 64
MIXED = ("interdomain", "softmax", "s4d")  # a hybrid compiles once what three models would
# What jax_disable_most_optimizations turns off.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "sequence": MeshConfig(data=1, sequence=8),  # two tokens a device: less than a chunk, and than the convolution
    "tensor": MeshConfig(data=2, tensor=4),
    "all": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}


def make_config(mixers, mesh, *, accumulation=1, seq_len=T, optimizer="adamw", dtype="float32", **ssm):
    return Config(
        model=ModelConfig(
            vocab_size=V,
            model_dim=16,
            num_layers=max(2, len(mixers)),
            num_heads=4,
            mlp_dim=24,
            mixers=mixers,
            ssm=SSMConfig(num_modes=5, **({"conv_width": 3} | ssm)),
        ),
        data=DataConfig(seq_len=seq_len),
        optim=OptimConfig(name=optimizer, peak_lr=1e-2, warmup_steps=2, eps=1e-2),  # eps: smooth, unlike a sign
        train=TrainConfig(steps=50, batch_size=B, accumulation=accumulation),
        compute=ComputeConfig(dtype=dtype, chunk_size=4, loss_chunk=16),
        mesh=mesh,
    )


def segment_ids():
    """One document; borders at and off the shards' borders; ids that come back; padding within, to the end, and all."""
    rows = [
        [0] * 16,
        [0] * 3 + [1] * 4 + [2] * 5 + [-1] * 4,
        [0] * 8 + [-1] * 8,
        [0] * 2 + [-1] * 14,
        [0] * 4 + [1] * 9 + [0] * 3,
        [0] * 7 + [-1] * 2 + [0] * 7,
        [-1] * 5 + [4] * 11,
        [-1] * 16,
    ]
    return np.array(rows, np.int32)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = segment_ids()
    tokens = {name: rng.integers(0, V, (B, T)).astype(np.int32) for name in ("inputs", "targets")}
    return tokens | {"segment_ids": ids, "loss_mask": (ids >= 0).astype(np.float32)}


def run_step(config, devices=None):
    """The trainer, its state before and after a step, and the metrics."""
    trainer = Trainer(config, make_mesh(config.mesh, devices))
    start = trainer.init()
    before = jax.tree.map(np.asarray, start)
    batch = place(trainer.mesh, make_batch(), local_rows(trainer.mesh, B), B)
    return trainer, before, *trainer.step(start, batch)


@pytest.fixture(scope="module")
def one_device():
    """Results of one device by arguments of `make_config`."""
    results = {}

    def get(mixers, **options):
        key = (mixers, *options.items())
        if key not in results:
            results[key] = run_step(make_config(mixers, MeshConfig(data=1), **options), jax.devices()[:1])
        return results[key]

    return get


def assert_same_step(results, expected):
    _, before, state, metrics = results
    _, before_1, state_1, metrics_1 = expected
    jax.tree.map(np.testing.assert_array_equal, before["params"], before_1["params"])
    for name in metrics_1:
        assert_close(metrics[name], metrics_1[name], "float32", reduction=B * T, gradient=True, name=name)
    # The first moments are a tenth of the clipped gradients; parameters moved by a step.
    assert jax.tree.structure(state) == jax.tree.structure(state_1)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(state_1), strict=True):
        name = jax.tree_util.keystr(path)
        assert_close(ours, np.asarray(theirs), "float32", reduction=B * T, gradient=True, name=name)
    assert np.abs(np.asarray(state["params"]["embedding"]) - before["params"]["embedding"]).max() > 1e-4


@pytest.mark.parametrize("mesh", ["all", *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != "all")])
def test_a_step_is_that_of_one_device(one_device, mesh):
    results = run_step(make_config(MIXED, MESHES[mesh]))
    assert_same_step(results, one_device(MIXED))
    trainer, _, state, _ = results
    for (path, x), wanted in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(trainer.abstract_state()), strict=True
    ):
        assert x.sharding == wanted.sharding, jax.tree_util.keystr(path)


DAMPED = dict(core="clock", write="damped", readout="hermitian")
FOLLOWING = [  # mixers whose states decay by what the tokens say, or correct themselves
    (("gated_deltanet", "gla"), {}),
    (("interdomain",), DAMPED),
    (("mamba2", "linear"), {}),
    (("interdomain",), dict(core="clock")),
    # Its addresses, divided by their squares, make more of float32's rounding than the bound allows.
    (("interdomain",), dict(write="delta", dtype="float64")),
]


@pytest.mark.parametrize(
    ("mixers", "options", "mesh"),
    [
        pytest.param(*case, mesh, marks=[pytest.mark.slow] if i > 1 or mesh == "all" else [])
        for i, case in enumerate(FOLLOWING)
        for mesh in ("sequence", "all")
    ],
)
def test_states_that_follow_the_tokens(one_device, mixers, options, mesh):
    with jax.enable_x64("dtype" in options):
        assert_same_step(run_step(make_config(mixers, MESHES[mesh], **options)), one_device(mixers, **options))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_other_mixers_too(one_device, mesh):
    mixers = ("single_query", "dual_linear", "softmax_conv")
    assert_same_step(run_step(make_config(mixers, MESHES[mesh])), one_device(mixers))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "tensor"])
def test_ideal_too(one_device, mesh):
    assert_same_step(run_step(make_config(("ideal",), MESHES[mesh])), one_device(("ideal",)))


@pytest.mark.slow
def test_accumulation_and_shared_states_on_a_mesh(one_device):
    options = dict(accumulation=2, heads_per_kv=2)
    results = run_step(make_config(("interdomain",), MESHES["all"], **options))
    expected = one_device(("interdomain",), **options)
    assert_same_step(results, expected)
    losses = []  # of an evaluation, in parts too
    for trainer, _, state, _ in (results, expected):
        batch = place(trainer.mesh, make_batch(), local_rows(trainer.mesh, B), B)
        losses.append(trainer.loss(state["params"], batch))
    for loss, of_one in zip(*losses, strict=True):
        assert_close(loss, of_one, "float32", reduction=B * T, gradient=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(conv_width=0, input_norms=False, feature_map="none"),
        dict(feature_map="softmax", heads_per_kv=2),
    ],
    ids=str,
)
def test_options_of_the_layer_on_a_mesh(one_device, options):
    assert_same_step(
        run_step(make_config(("interdomain",), MESHES["all"], **options)), one_device(("interdomain",), **options)
    )


@pytest.mark.slow
def test_muon_too(one_device):
    """Newton-Schulz steps are products of whole matrices, also where those are split."""
    options = dict(optimizer="muon")
    results = run_step(make_config(("interdomain",), MESHES["all"], **options))
    assert_same_step(results, one_device(("interdomain",), **options))
    trainer, _, state, _ = results
    rules = state["opt_state"][1].inner_states
    muon, adam = (rules[name].inner_state for name in ("muon", "adam"))
    block = muon[0].mu["groups"]["block_0"]
    expected = trainer.abstract_state()["params"]["groups"]["block_0"]["mlp"]["gate"]["weight"].sharding
    assert block["mlp"]["gate"]["weight"].sharding == expected
    assert isinstance(block["mlp_norm"]["scale"], optax.MaskedNode)
    assert isinstance(adam.mu["groups"]["block_0"]["mlp"]["gate"]["weight"], optax.MaskedNode)


def test_where_parameters_lie():
    trainer = Trainer(make_config(MIXED, MESHES["all"]))
    state = trainer.abstract_state()
    params, moments = state["params"], state["opt_state"][1].mu
    interdomain, softmax = (params["groups"][f"block_{i}"]["mixer"] for i in (0, 1))
    width = ("fsdp", "sequence")
    expected = {
        "embedding": (params["embedding"], ("tensor", width)),
        "its moment": (moments["embedding"], ("tensor", width)),
        "head": (params["head"]["weight"], (width, "tensor")),
        "key": (interdomain["key"]["weight"], (None, width, "tensor")),
        "output": (interdomain["output"]["weight"], (None, "tensor", width)),
        "taps": (interdomain["core"]["key_conv"]["taps"], (None, None, "tensor")),
        "c": (interdomain["core"]["basis"]["c"], (None, None, "tensor", None, None)),
        "log_delta": (interdomain["core"]["basis"]["log_delta"], (None, "tensor")),
        "softmax": (softmax["value"]["weight"], (None, width, "tensor")),
        "norm": (params["final_norm"]["scale"], (None,)),
        "step": (state["step"], ()),
    }
    for name, (x, axes) in expected.items():
        wanted = NamedSharding(trainer.mesh, PartitionSpec(*axes))
        assert x.sharding.is_equivalent_to(wanted, x.ndim), name
    # Of the matrices a device holds an eighth, of the small rest half or all.
    total, local = (sum(np.prod(shape(x)) for x in jax.tree.leaves(state)) for shape in (np.shape, shard_shape))
    assert local < 0.35 * total


def shard_shape(x):
    return x.sharding.shard_shape(x.shape)


def make_layer(T, sequence, dtype="float32", **options):
    """The layer on a mesh over the sequence: its compiled call, and arguments as shapes."""
    layer = nnx.eval_shape(lambda: InterdomainAttention(16, 4, rngs=nnx.Rngs(0), num_modes=5, **options))
    graphdef, params = nnx.split(layer)
    mesh = make_mesh(MeshConfig(data=1, sequence=sequence), jax.devices()[:sequence])
    tokens = NamedSharding(mesh, spec("B", "T"))
    x = jax.ShapeDtypeStruct((2, T, 16), dtype, sharding=tokens)
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32, sharding=tokens)
    call = jax.jit(lambda params, x, ids: nnx.merge(graphdef, params)(x, segment_ids=ids)[0])
    with jax.set_mesh(mesh):
        return call.lower(params, x, ids).compile()


def collective_bytes(text):
    """Bytes of the results of all collectives in HLO text."""
    sizes = {"f32": 4, "s32": 4, "pred": 1, "bf16": 2}
    total = 0
    for shapes in re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)", text):
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total += sizes[kind] * int(np.prod([int(d) for d in dims.split(",") if d]))
    return total


@pytest.mark.parametrize("options", [{}, DAMPED], ids=str)
def test_what_crosses_does_not_depend_on_the_length(options):
    short, long = (make_layer(length, 4, **options) for length in (64, 512))
    assert collective_bytes(short.as_text()) == collective_bytes(long.as_text()) > 0
    assert long.output_shardings.shard_shape((2, 512, 16)) == (2, 128, 16)


def test_shards_of_few_tokens():
    """A token each is enough for the state; convolutions need as many as they look back."""
    with pytest.raises(ValueError, match="a shard of 2 tokens must have at least conv_width - 1 = 3"):
        make_layer(8, 4)
    layer = InterdomainAttention(16, 4, rngs=nnx.Rngs(0), num_modes=5, conv_width=0, core="clock")
    x = jax.random.normal(jax.random.key(0), (B, 4, 16))
    state = layer(x)[1]
    expected = layer(x, state=state)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=4, tensor=2))):
        actual = jax.jit(lambda x, state: layer(x, state=state))(x, state)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(ours, np.asarray(theirs), "float32", reduction=8)


@pytest.mark.parametrize(
    "options",
    [
        dict(c_init_scale=4.0),
        dict(denominator=True, readout="hermitian", c="identity", feature_map="positive"),
        pytest.param(DAMPED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_state_passes_through_shards(options):
    """Two calls with the state between them are one call, though each is split over four devices."""
    layer = nnx.jit(lambda: InterdomainAttention(16, 4, rngs=nnx.Rngs(0), num_modes=5, **options))()
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(0), (B, 2 * T, 16))
    ids = jnp.concatenate([segment_ids(), segment_ids()[::-1]], axis=1)

    @partial(jax.jit, compiler_options=OPTIMISED)
    def call(params, x, ids, state):
        return nnx.merge(graphdef, params)(x, segment_ids=ids, state=state)

    start = layer.init_state(B)
    expected = [first := call(params, x[:, :T], ids[:, :T], start), call(params, x[:, T:], ids[:, T:], first[1])]
    mesh = make_mesh(MeshConfig(data=1, sequence=4, tensor=2))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, spec("B", "T"))
        x, ids = jax.device_put(x, split), jax.device_put(ids, split)
        actual = [first := call(params, x[:, :T], ids[:, :T], start), call(params, x[:, T:], ids[:, T:], first[1])]
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(ours, np.asarray(theirs), "float32", reduction=2 * T)


@pytest.mark.slow
def test_documents_of_unsigned_ids_end_at_the_borders_of_shards():
    """255 is an id of uint8, though it wraps to that of padding."""
    layer = InterdomainAttention(16, 4, rngs=nnx.Rngs(0), num_modes=5)
    x = jax.random.normal(jax.random.key(0), (1, T, 16))
    ids = jnp.where(jnp.arange(T)[None] < T // 2, 3, 255)
    expected = layer(x, segment_ids=ids)[0]
    with jax.set_mesh(make_mesh(MeshConfig(data=1, sequence=4, tensor=2))):
        actual = jax.jit(lambda x, ids: layer(x, segment_ids=ids)[0])(x, ids.astype("uint8"))
    assert_close(actual, np.asarray(expected), "float32", reduction=T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"fsdp": 3}}, r"data=-1, fsdp=3, sequence=1, tensor=1 must multiply to the 8 devices"),
        ({"mesh": {"data": 2}}, r"data=2, fsdp=1, sequence=1, tensor=1 must multiply to the 8 devices"),
        ({"mesh": {"slices": 3}}, r"mesh\.slices=3 must divide mesh\.data=8"),
        (
            {"mesh": {"slices": 2, "fsdp": 8}},
            r"mesh\.slices=2 must divide mesh\.data=1.* at most the 4 devices of a slice",
        ),
        ({"mesh": {"tensor": 8}}, r"mesh\.tensor=8 must divide model\.num_heads=4"),
        ({"mesh": {"data": 1, "sequence": 8}, "data": {"seq_len": 20}}, r"mesh\.sequence=8 must divide .*seq_len=20"),
        (
            {"mesh": {"data": 2, "fsdp": 4}, "train": {"batch_size": 12}},
            r"data=2 x mesh\.fsdp=4 must divide .*=12",
        ),
        ({"mesh": {"data": 4, "fsdp": 2}, "train": {"accumulation": 2}}, r"must divide train.batch_size / .*=4"),
        (
            {"mesh": {"fsdp": 8}, "model": {"model_dim": 20, "num_heads": 2}},
            r"mesh\.fsdp=8 x mesh\.sequence=1 must divide model.model_dim=20",
        ),
        ({"mesh": {"tensor": 4}, "model": {"vocab_size": 257}}, r"mesh\.tensor=4 must divide model\.vocab_size=257"),
        ({"mesh": {"tensor": 4}, "model": {"mlp_dim": 22}}, r"mesh\.tensor=4 must divide model\.mlp_dim=22"),
        ({"mesh": {"tensor": 4}, "model": {"ssm": {"heads_per_kv": 2}}}, r"heads_per_kv,=2"),
        ({"mesh": {"data": 1, "sequence": 8}, "model": {"ssm": {"conv_width": 4}}}, r"leaves 2 .* looks back 3"),
    ],
)
def test_what_does_not_divide_is_refused(changes, message):
    values = dataclasses.asdict(make_config(("interdomain",), MeshConfig()))

    def change(values, changes):
        for name, value in changes.items():
            if isinstance(value, dict):
                change(values[name], value)
            else:
                values[name] = value

    change(values, changes)
    config = from_config_dict(values)
    with pytest.raises(ValueError, match=message):
        check_divides(config, make_mesh(config.mesh))


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "stand-in"
    process_index: int = 0


def test_data_alone_goes_over_slices():
    """Whatever the order of the devices; simulated ones, which know of no slices, are taken as they come."""
    config = MeshConfig(data=4, fsdp=2, slices=2)
    mixed = make_mesh(config, [SliceDevice(id, id % 2) for id in range(8)]).devices
    assert [{device.slice_index for device in row.flat} for row in mixed] == [{0}, {0}, {1}, {1}]
    assert [device.id for device in mixed.flat] == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [device.id for device in make_mesh(config).devices.flat] == list(range(8))


@pytest.mark.parametrize(("platform", "slices"), [("tpu", 1), ("tpu", 4), ("gpu", 4)])
def test_other_slices_than_the_devices_have_are_refused(platform, slices):
    devices = [SliceDevice(id, id // 4, platform) for id in range(8)]
    with pytest.raises(ValueError, match=rf"mesh\.slices={slices} must be 2, .*: --config\.mesh\.slices=2"):
        make_mesh(MeshConfig(slices=slices), devices)


def test_any_axis_may_go_over_the_hosts_of_gpus():
    devices = [SliceDevice(id, id // 4) for id in range(8)]
    assert make_mesh(MeshConfig(data=1, fsdp=8), devices).shape["fsdp"] == 8


@pytest.mark.parametrize("mixer", ["softmax", "softmax_conv", "ideal"])
def test_what_is_not_split_over_tokens(mixer):
    config = make_config((mixer,), MeshConfig())

    def resume(tokens):
        model = LanguageModel(config.model, config.compute, rngs=nnx.Rngs(0))
        return model(tokens, state=model.init_state(B, T))

    mesh = make_mesh(MeshConfig(data=1, sequence=8))
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match=r"mesh\.sequence=1"):
        jax.eval_shape(resume, jnp.zeros((B, T), jnp.int32))


def test_without_a_mesh_nothing_is_wrapped():
    def function(x):
        return x

    assert on_shards(function, None, None) is function
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert on_shards(function, None, None) is function


def test_one_process_reads_all_rows():
    """Placing them puts each where it belongs; `train/test_processes.py` has several processes."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    assert local_rows(mesh, B) == list(range(B))
    x = np.arange(B * T, dtype=np.int32).reshape(B, T)
    placed = place(mesh, {"inputs": x}, list(range(B)), B)["inputs"]
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding.shard_shape(placed.shape) == (2, 8)
