"""The mixers: against the oracle, causal, the same token by token, and deaf across documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import oracles
from support.helpers import assert_close
from support.mixers import EACH
from support.moving_average import MovingAverage

from idattn.choices import MIXERS, find_mixer
from idattn.config import ComputeConfig, IdealConfig, ModelConfig, SSMConfig
from idattn.nn import InterdomainAttention, LanguageModel, SSMMixer

COMPUTE = ComputeConfig(dtype="float32", chunk_size=4)
B, T, D = 2, 11, 12
# Tests share the programs for T tokens, with and without a state, and those for 2 T tokens.
ROOM = 2 * T  # tokens that a state has room for


def make_mixer(name, compute=COMPUTE, **ssm):
    std = 0.5 if name == "ideal" else 0.02
    ideal = IdealConfig(num_features=8)
    ssm = SSMConfig(num_modes=5, **ssm)
    config = ModelConfig.tiny(name, init_std=std, rope_base=50.0, norm_eps=0.2, ssm=ssm, ideal=ideal)
    mixer = find_mixer(name)(config, residual_std=0.5, compute=compute, rngs=nnx.Rngs(1))
    if isinstance(mixer, SSMMixer):
        for norm in ("key_norm", "value_norm") if mixer.config.ssm.input_norms else ():
            bias = getattr(mixer.core, norm).bias
            bias[...] = jax.random.normal(jax.random.key(3), bias.shape)
    return mixer


@nnx.jit
def run(mixer, x, segment_ids=None, state=None):
    return mixer(x, segment_ids=segment_ids, state=state)


def inputs(seed=0, length=T):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D)), jnp.float32)


def token_by_token(mixer, x):
    state, outputs = mixer.init_state(B, ROOM, x.dtype), []
    for t in range(x.shape[1]):
        y, state = run(mixer, x[:, t : t + 1], None, state)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


def silu(x):
    return x / (1 + np.exp(-x))


SSM_MIXERS = [name for name in MIXERS if issubclass(find_mixer(name), SSMMixer)]
PARTS = {  # what makes each: (the first input goes through the feature map, queries read, rotary positions)
    "interdomain": (True, True, True),
    "interdomain_norope": (True, True, False),
    "single_query": (False, True, True),
    "single_query_norope": (False, True, False),
    "dual_linear": (True, False, True),
    "dual_linear_norope": (True, False, False),
    "s4d": (False, False, False),
    "s4d_rope": (False, False, True),
}
LESS = ({"conv_width": 0}, {"input_norms": False}, {"feature_map": "none"})  # of the layer
DIVIDED = {"denominator": True, "readout": "hermitian", "c": "identity", "feature_map": "positive"}
RANDOM = ({"feature_map": "positive"}, {"feature_map": "softmax", "rope_position": "after"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"output_gate": name == "s4d"}) for name in SSM_MIXERS),
        *((name, options) for name in ("interdomain", "single_query", "dual_linear") for options in LESS + RANDOM),
        *((name, DIVIDED | {"output_gate": True}) for name in ("interdomain", "single_query")),
        ("interdomain", DIVIDED | {"feature_map": "silu_l2", "input_norms": False}),
    ],
    ids=str,
)
def test_ssm_mixers_equal_their_definition(name, options):
    """The whole mixer in numpy, around the oracle's recurrence."""
    mixer, x = make_mixer(name, **options), inputs()
    mapped, by_query, rope = PARTS[name]
    ssm = mixer.config.ssm
    state = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))
    state |= state.pop("core")
    z = np.asarray(x, np.float64)
    positions = np.arange(T)[:, None, None]

    def convolve(name, y):
        if f"{name}_conv" not in state:
            return y
        taps, padded = state[f"{name}_conv"]["taps"], np.concatenate([np.zeros((B, 3, y.shape[-1])), y], 1)
        return state[f"{name}_conv"]["bias"] + sum(taps[i] * padded[:, i : i + T] for i in range(4))

    def rotate(y):
        rotated = (y[..., :3] + 1j * y[..., 3:]) * np.exp(1j * positions * 50.0 ** (-np.arange(3) / 3))
        return np.concatenate([rotated.real, rotated.imag], -1) if rope else y

    def feature_map(y):
        if ssm.feature_map == "silu_l2":
            return silu(y) / np.sqrt((silu(y) ** 2).sum(-1, keepdims=True) + 1e-6)
        if ssm.feature_map == "none":
            return y
        y = y / 6**0.25
        square = (y**2).sum(-1, keepdims=True) / (2 if ssm.feature_map == "softmax" else 1)
        return np.exp(y @ np.random.default_rng(0).standard_normal((6, 6)) - square) / np.sqrt(6)

    def prepare(y, use_map):
        y = y.reshape(B, T, 2, 6)
        y = y if ssm.rope_position == "after" else rotate(y)
        y = feature_map(y) if use_map else y
        return rotate(y) if ssm.rope_position == "after" else y

    def normalise(name, y):
        if name not in state:
            return y
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 0.2) * state[name]["scale"] + state[name]["bias"]

    key = convolve("key", z @ state["key"]["weight"])
    value = z @ state["value"]["weight"]
    value = convolve("value", value)
    k = normalise("key_norm", prepare(key, mapped))
    v = normalise("value_norm", value.reshape(B, T, 2, 6))
    basis = state["basis"]
    case = {name: basis[name] for name in ("log_delta", "a_log", "a_imag")}
    case |= {"c_re": basis["c"][0], "c_im": basis["c"][1]} if "c" in basis else {}
    if by_query:
        q = prepare(convolve("query", z @ state["query"]["weight"]), True)
        o, _ = oracles.forward(case | {"q": q, "k": k, "v": v}, ssm.readout)
        if ssm.denominator:
            o = o / oracles.forward(case | {"q": q, "k": k, "v": np.ones_like(v)}, ssm.readout)[0]
    else:
        o, _ = oracles.linear_forward(case | {"z": np.concatenate([k, v], -1), "c_out": state["c_out"]})
    o = o.reshape(B, T, -1)
    if mixer.gate is not None:
        o = silu(z @ state["gate"]["weight"]) * o
    y, _ = run(mixer, x)
    assert_close(y, o @ state["output"]["weight"], "float32", reduction=T * D)


@pytest.mark.parametrize("name", EACH)
def test_causal_by_gradient(name):
    """Outputs depend on no later token, and on every earlier one."""
    mixer, t = make_mixer(name), 6
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(mixer(x)[0][:, t] ** 2)))(inputs())
    size = np.abs(gradient).max(axis=(0, 2))
    assert (size[t + 1 :] == 0).all()
    assert (size[: t + 1] > 0).all()


@pytest.mark.parametrize("name", EACH)
def test_token_by_token_equals_whole(name):
    mixer, x = make_mixer(name), inputs()
    whole, final = run(mixer, x, None, mixer.init_state(B, ROOM, x.dtype))
    steps, stepped = token_by_token(mixer, x)
    assert_close(steps, whole, "float32", reduction=T * D)
    for a, b in zip(jax.tree.leaves(stepped), jax.tree.leaves(final), strict=True):
        assert_close(a, b, "float32", reduction=T * D)
    assert_close(whole, run(mixer, x)[0], "float32", reduction=T * D)


SSM_OPTIONS = [
    {"write": "delta"},
    {"write": "damped", "readout": "hermitian"},
    {"readout": "hermitian"},
    {"readout": "real"},
    {"a_init": "s4d_lin"},
    {"a_init": "uniform"},
    {"c": "diagonal"},
    {"c": "identity"},
    {"c_init": "eye"},
    {"heads_per_kv": 2},
    {"rope_position": "after"},
    {"output_gate": True},
    {"conv_width": 1},
    *LESS,
    *RANDOM,
    DIVIDED,
    DIVIDED | {"core": "clock"},
    {"write": "delta", "input_norms": False},
    {"norm_bias_init": 1.0},
]


@pytest.mark.parametrize("options", SSM_OPTIONS, ids=str)
def test_options_change_the_layer_and_keep_its_modes_equal(options):
    layer = InterdomainAttention(D, 2, rngs=nnx.Rngs(1), compute=COMPUTE, num_modes=5, **options)
    plain = InterdomainAttention(D, 2, rngs=nnx.Rngs(1), compute=COMPUTE, num_modes=5)
    x = inputs()
    y, _ = run(layer, x)
    assert not np.allclose(y, run(plain, x)[0], rtol=1e-2)
    assert_close(token_by_token(layer, x)[0], y, "float32", reduction=T * D)


def test_a_clock_starts_as_the_paper_and_then_leaves_it():
    """Bit for bit at the start; with weights, one token after another is the whole, and resets forget, as ever."""
    options = {"compute": COMPUTE, "num_modes": 5}
    plain, layer, both = (
        InterdomainAttention(D, 2, rngs=nnx.Rngs(1), **options, **adaptive)
        for adaptive in ({}, {"core": "clock"}, {"core": "clock", "write": "delta"})
    )
    x = inputs()
    np.testing.assert_array_equal(run(layer, x)[0], run(plain, x)[0])
    for mixer in (layer, both):
        mixer.clock.weight[...] = jax.random.normal(jax.random.key(0), mixer.clock.weight.shape)
        y, _ = run(mixer, x)
        assert not np.allclose(y, run(plain, x)[0], rtol=1e-2)
        assert_close(token_by_token(mixer, x)[0], y, "float32", reduction=T * D)
    ids = jnp.asarray([[0] * 4 + [1] * (T - 4)] * B)
    assert_close(run(both, x, ids)[0][:, 4:], run(both, x[:, 4:])[0], "float32", reduction=T * D)
    other = jnp.concatenate([inputs(1)[:, :4], x[:, 4:]], axis=1)
    np.testing.assert_array_equal(run(both, x, ids)[0][:, 4:], run(both, other, ids)[0][:, 4:])


def test_other_mixers_refuse_a_clock():
    with pytest.raises(ValueError, match="core='clock' and write='add' are for the mixers interdomain"):
        make_mixer("s4d", core="clock")


@pytest.mark.parametrize("name", EACH)
def test_documents_do_not_leak(name):
    """Packed documents equal each by itself bit for bit in what they see; without ids they do not."""
    model = LanguageModel(ModelConfig.tiny(name), COMPUTE, rngs=nnx.Rngs(0))
    first, other, second = (jnp.asarray(np.random.default_rng(s).integers(0, 37, (B, 7))) for s in range(3))
    ids = jnp.asarray([[0] * 7 + [1] * 7, [3] * 7 + [0] * 7])

    def logits(document, segment_ids):
        return run(model, jnp.concatenate([document, second], axis=1), segment_ids)[0][:, 7:]

    np.testing.assert_array_equal(logits(first, ids), logits(other, ids))
    assert (np.abs(logits(first, None) - logits(other, None)).max(axis=-1) > 0).all()
    alone = run(model, jnp.concatenate([second, other], axis=1), None)[0][:, :7]
    assert_close(logits(first, ids), alone, "float32", reduction=T * D)


@pytest.mark.parametrize("name", ["interdomain", "softmax"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16", "uint32"])
def test_segment_ids_may_be_integers_of_any_kind(name, dtype):
    """As int32, from JAX and from NumPy; the largest unsigned number, which is -1 where it wraps, is an id."""
    mixer, x = make_mixer(name), inputs(length=7)
    ids = np.array([[0, 0, 1, 1, 1, 0, 0], [3, 3, 3, 2, 2, 2, 2]])
    last = -1 if dtype.startswith("int") else np.iinfo(dtype).max
    expected = run(mixer, x, jnp.asarray(np.where(ids == 0, -1 if last == -1 else 9, ids), jnp.int32))[0]
    ids = np.where(ids == 0, last, ids).astype(dtype)
    for given in (ids, jnp.asarray(ids)):
        np.testing.assert_array_equal(run(mixer, x, given)[0], expected)


@pytest.mark.parametrize("name", EACH)
def test_a_state_keeps_its_dtype_in_a_scan(name):
    """A state stored in bfloat16 stays so, and a fixed size of it changes the outputs by its rounding alone."""
    mixer, x = make_mixer(name), inputs()

    def step(state, x):
        y, state = mixer(x[:, None], state=state)
        return state, y[:, 0]

    start = mixer.init_state(B, T, x.dtype, jnp.bfloat16)
    final, y = jax.jit(lambda x: jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0)))(x)
    assert [leaf.dtype for leaf in jax.tree.leaves(final)] == [leaf.dtype for leaf in jax.tree.leaves(start)]
    assert_close(jnp.moveaxis(y, 0, 1), run(mixer, x)[0], "float32" if mixer.grows else "bfloat16", reduction=T * D)


@pytest.mark.parametrize("name", EACH)
def test_state_follows_the_last_token_that_is_not_padding(name):
    """Ragged rows: a right-padded batch continues exactly as each row by itself would."""
    mixer, x, more = make_mixer(name), inputs(), inputs(1)
    lengths = (5, 8)
    ids = jnp.where(jnp.arange(T)[None] < jnp.asarray(lengths)[:, None], 0, -1)
    poisoned = jnp.where(ids[..., None] < 0, 1e4, x)
    padded, state = run(mixer, poisoned, ids, mixer.init_state(B, ROOM, x.dtype))
    after, _ = run(mixer, more, None, state)
    for b, n in enumerate(lengths):
        row = jnp.concatenate([x[:, :n], more, x[:, n:]], axis=1)  # what follows is seen by none
        alone = run(mixer, row)[0][b]
        assert_close(padded[b, :n], alone[:n], "float32", reduction=T * D)
        assert_close(after[b], alone[n : n + T], "float32", reduction=T * D)


@pytest.mark.parametrize("name", ["softmax", "softmax_conv"])
def test_a_cache_that_cannot_hold_the_tokens_is_refused(name):
    mixer, x = make_mixer(name), inputs()
    _, state = mixer(x)
    with pytest.raises(ValueError, match=r"no tokens to resume from: \w+ keeps them .* `init_state"):
        mixer(x, state=state)
    with pytest.raises(ValueError, match=f"{T} tokens do not fit into a cache with room for max_tokens=4"):
        mixer(x, state=mixer.init_state(B, 4))


@pytest.mark.parametrize("name", EACH)
def test_a_reset_in_a_later_call_forgets_the_state(name):
    mixer, x, more = make_mixer(name), inputs(), inputs(1)
    _, state = run(mixer, x, None, mixer.init_state(B, ROOM, x.dtype))  # a cache stores every document's keys
    ids = jnp.asarray([[0, 0] + [1] * (T - 2)] * B)
    y, _ = run(mixer, more, ids, state)
    continued, _ = run(mixer, jnp.concatenate([x, more], axis=1))
    assert_close(y[:, :2], continued[:, T : T + 2], "float32", reduction=T * D)
    anew, _ = run(mixer, jnp.concatenate([more[:, 2:], x, x[:, :2]], axis=1))
    assert_close(y[:, 2:], anew[:, : T - 2], "float32", reduction=T * D)
    _, state = run(mixer, more, ids, mixer.init_state(B, ROOM, x.dtype))
    assert_close(run(mixer, x, None, state)[0], anew[:, T - 2 : 2 * T - 2], "float32", reduction=T * D)


def test_query_heads_that_share_a_state():
    """heads_per_kv = H gives a single state, an H-th of the recurrent memory."""
    layer = InterdomainAttention(D, 2, rngs=nnx.Rngs(0), compute=COMPUTE, num_modes=5, heads_per_kv=2)
    _, state = run(layer, inputs())
    assert state.memory.state.shape == (B, 1, 12, 2 * 5)
    with pytest.raises(ValueError, match="heads_per_kv=2 needs a readout by queries"):
        make_mixer("s4d", heads_per_kv=2)


@pytest.mark.parametrize("name", ["interdomain", "dual_linear"])
def test_backends_agree_in_the_layer(name):
    """Equal numbers from three programs."""
    x = inputs()
    layers = [
        make_mixer(name, dataclasses.replace(COMPUTE, backend=b, chunk_size=k))
        for b, k in (("recurrent", 4), ("chunkwise", 4), ("chunkwise", 3))
    ]
    assert len({jax.jit(lambda x, layer=layer: layer(x)[0]).lower(x).as_text() for layer in layers}) == 3
    first, *others = (run(layer, x)[0] for layer in layers)
    for other in others:
        assert_close(other, first, "float32", reduction=T * D)


def test_a_call_outside_of_jit_is_one_program(monkeypatch):
    """Its Python runs once for each shape, in gradients too, and for equal layers; numbers are those under jit."""
    calls, mix = [], SSMMixer.mix
    monkeypatch.setattr(SSMMixer, "mix", lambda self, x, *others: (calls.append(x.shape), mix(self, x, *others))[1])
    layers = [make_mixer("interdomain", c_init_scale=scale) for scale in (0.3, 0.3)]
    x = inputs(5)
    loss = nnx.value_and_grad(lambda layer, x: (layer(x)[0] ** 2).sum())
    for layer in layers:
        (y, state), (_, gradients) = layer(x), loss(layer, x)
        last, _ = layer(x[:, :1], state=state)
    assert len(calls) == 2 and {shape[1] for shape in calls} == {1, T}
    monkeypatch.undo()
    call = nnx.jit(lambda layer, x, state: layer._call(x, None, state))
    wanted, state = call(layer, x, None)
    assert_close(y, wanted, "float32")
    assert_close(last, call(layer, x[:, :1], state)[0], "float32")
    expected = nnx.jit(nnx.grad(lambda layer, x: (call(layer, x, None)[0] ** 2).sum()))(layer, x)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32", reduction=B * T, gradient=True), gradients, expected)


def test_a_call_keeps_what_a_mixer_changes():
    class Counting(MovingAverage):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.count = nnx.Variable(jnp.zeros((), jnp.int32))

        def mix(self, x, documents, memory):
            self.count[...] += 1
            return super().mix(x, documents, memory)

    layer = Counting(ModelConfig.tiny(), residual_std=0.5, compute=COMPUTE, rngs=nnx.Rngs(0))
    layer(inputs()), layer(inputs())
    assert layer.count[...] == 2


def test_bad_sizes_of_the_layer():
    with pytest.raises(ValueError, match="num_heads=5 must divide model_dim=12"):
        InterdomainAttention(12, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="head_dim=3 .* must be even"):
        InterdomainAttention(12, 4, rngs=nnx.Rngs(0))
    odd = InterdomainAttention(D, 4, rope=False, rngs=nnx.Rngs(0))  # only rotary positions need pairs of channels
    assert run(odd, inputs())[0].shape == (B, T, D)
    with pytest.raises(TypeError, match="modes"):
        InterdomainAttention(12, 2, rngs=nnx.Rngs(0), modes=3)


def test_parameters_of_the_layer_name_their_group():
    layer = InterdomainAttention(D, 2, rngs=nnx.Rngs(0), num_modes=5)
    groups = {}
    for path, variable in nnx.to_flat_state(nnx.state(layer)):
        assert type(variable) is nnx.Param  # flax.linen makes a collection of every other type
        assert not variable[...].weak_type, path  # or a training step is compiled twice
        groups.setdefault(variable.get_metadata("group"), set()).add(".".join(map(str, path)))
    norms = {f"core.{n}_norm.{p}" for n in ("key", "value") for p in ("scale", "bias")}
    assert groups["ssm"] == norms | {f"core.basis.{p}" for p in ("log_delta", "a_log", "a_imag", "c")}
    assert groups["matrix"] == {f"{n}.weight" for n in ("key", "value", "query", "output")}
    assert groups["other"] == {f"core.{n}_conv.{p}" for n in ("key", "query") for p in ("taps", "bias")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("interdomain", {}),
        ("s4d", {}),
        ("interdomain", {"core": "clock"}),
        ("gated_deltanet", {}),
    ],
    ids=str,
)
def test_batch_and_length_may_be_symbolic(name, options):
    """One program of jax.export for any of them, shorter and longer than a chunk."""
    mixer = make_mixer(name, **options)
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, t, {D}"), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: mixer(x)[0]))(x)
    for length in (1, T):
        x = inputs(length=length)
        assert_close(exported.call(x), run(mixer, x)[0], "float32", reduction=T)


def test_an_exported_program_survives_as_bytes():
    pytest.importorskip("flatbuffers")
    mixer, x = make_mixer("interdomain"), inputs()
    exported = jax.export.export(jax.jit(lambda x: mixer(x)[0]))(x)
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_array_equal(restored.call(x), exported.call(x))
    gradients = (jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(x) for f in (restored.call, exported.call))
    np.testing.assert_array_equal(*gradients)
