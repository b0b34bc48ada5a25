"""Configs survive the way through ConfigDict, and every value that breaks a rule is named with the rule."""

import dataclasses
import json
import re

import numpy as np
import pytest

from configs import paper
from configs import quickstart as quickstart_file
from idattn.choices import MIXERS, check_choice
from idattn.config import (
    ComputeConfig,
    Config,
    DataConfig,
    IdealConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    SSMConfig,
    TrainConfig,
    from_config_dict,
    quickstart,
    to_config_dict,
)

CONFIG = Config(
    seed=7,
    model=ModelConfig.tiny(
        "interdomain", "softmax", ssm=SSMConfig(num_modes=3, heads_per_kv=2, c="diagonal", readout="real")
    ),
    data=DataConfig(seq_len=16, source="text.jsonl", holdout=("a", "b")),
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=3),
    train=TrainConfig(steps=9, batch_size=6, accumulation=3, sample_prompt="so"),
    compute=ComputeConfig(dtype="float64", backend="recurrent", remat="block"),
)


@pytest.mark.parametrize("config", [CONFIG, quickstart()])
def test_round_trip(config):
    values = to_config_dict(config)
    assert from_config_dict(values) == config
    assert from_config_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config  # lists for tuples
    with values.unlocked():
        values.model.mixers = ("softmax",)
        values.optim.peak_lr = 0.25
    changed = from_config_dict(values)
    assert (changed.model.mixers, changed.optim.peak_lr) == (("softmax",), 0.25)
    assert changed != config


def test_config_dict_is_locked():
    values = to_config_dict(CONFIG)
    with pytest.raises(AttributeError, match="peak_lrr"):
        values.optim.peak_lrr = 1.0


def test_config_files():
    assert from_config_dict(quickstart_file.get_config()) == quickstart()
    config = from_config_dict(paper.get_config("760M,s4d"))
    assert (config.model.model_dim, config.model.num_layers, config.model.num_heads) == (1536, 24, 16)
    assert (config.model.mlp_dim, config.model.mixers, config.model.head_dim) == (4096, ("s4d",), 96)
    for argument, near in (
        ("1.3b,softmax", "scale='1.3b' is not known. Did you mean '1.3B'?"),
        ("125M,softmaxx", "mixer='softmaxx' is not known. Did you mean 'softmax'?"),
        ("125M", "'125M' must be SCALE,MIXER"),
    ):
        with pytest.raises(ValueError, match=re.escape(near)):
            paper.get_config(argument)


def test_tiny_and_derived_sizes():
    assert ModelConfig.tiny("s4d", "softmax", "interdomain").num_layers == 3
    assert ModelConfig.tiny().mixers == ("interdomain",)
    model = ModelConfig.tiny(model_dim=24, num_heads=6, ssm=SSMConfig(heads_per_kv=3))
    assert (model.head_dim, model.num_kv_heads) == (4, 2)


def frozen_sections():
    return [CONFIG, CONFIG.model, CONFIG.model.ssm, CONFIG.data, CONFIG.optim, CONFIG.train, CONFIG.compute]


@pytest.mark.parametrize("section", frozen_sections(), ids=lambda section: type(section).__name__)
def test_frozen_and_hashable(section):
    name = dataclasses.fields(section)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section, name, None)
    assert hash(section) == hash(dataclasses.replace(section))


def at_least(section, bound, *names):
    for name in names:
        value = type(getattr(section, name))(bound - 1)
        yield section, {name: value}, f"{name}={value} must be at least {bound}."


def below(section, bound, *names):
    for name in names:
        value = type(getattr(section, name))(bound)
        yield section, {name: value}, f"{name}={value} must be less than {bound}."


def positive(section, *names):
    for name in names:
        for value in (0.0, -1.0):
            yield section, {name: value}, f"{name}={value} must be greater than 0."


def unknown(section, name, value, near, label=None):
    label = label or name
    return section, {name: value}, f"{label}={value!r} is not known. Did you mean {near!r}? It must be one of "


SSM, IDEAL, MODEL, DATA, OPTIM, TRAIN, COMPUTE = (
    SSMConfig(), IdealConfig(), ModelConfig.tiny(), CONFIG.data, CONFIG.optim, CONFIG.train, CONFIG.compute
)  # fmt: skip
BROKEN = [
    *at_least(SSM, 1, "num_modes", "heads_per_kv"),
    *at_least(SSM, 0, "conv_width"),
    (SSM, {"norm_bias_init": 1.0, "input_norms": False}, "norm_bias_init=1.0 needs input_norms, whose biases start "),
    *positive(SSM, "c_init_scale", "delta_min"),
    (SSM, {"delta_min": 0.5, "delta_max": 0.25}, "delta_min=0.5 must not exceed delta_max=0.25."),
    unknown(SSM, "feature_map", "silu", "silu_l2"),
    (
        SSM,
        {"write": "delta", "feature_map": "none"},
        "write='delta' needs feature_map='silu_l2', whose keys have length 1, not 'none'.",
    ),
    (SSM, {"write": "delta", "denominator": True}, "denominator needs write='add', as 'delta' does not add up values "),
    unknown(SSM, "core", "clok", "clock"),
    unknown(SSM, "write", "dleta", "delta"),
    unknown(SSM, "readout", "hermitain", "hermitian"),
    unknown(SSM, "a_init", "unifrom", "uniform"),
    unknown(SSM, "c", "diag", "diagonal"),
    unknown(SSM, "c_init", "norml", "normal"),
    unknown(SSM, "rope_position", "befor", "before"),
    *at_least(IDEAL, 1, "num_features"),
    *at_least(IDEAL, 0, "seed"),
    *positive(IDEAL, "floor"),
    unknown(IDEAL, "features", "furier", "fourier"),
    (IDEAL, {"features": "fourier", "num_features": 7}, "num_features=7 must be even: a cosine and a sine "),
    *at_least(MODEL, 1, "vocab_size", "model_dim", "num_layers", "num_heads", "mlp_dim"),
    *positive(MODEL, "rope_base", "norm_eps", "init_std"),
    (MODEL, {"mixers": ()}, "mixers=() must name at least one mixer of interdomain, "),
    (MODEL, {"mixers": ("interdomian",)}, "mixer='interdomian' is not known. Did you mean 'interdomain'?"),
    (
        MODEL,
        {"num_layers": 3, "mixers": ("s4d", "softmax")},
        "num_layers=3 must be a multiple of the 2 mixers of the pattern ('s4d', 'softmax').",
    ),
    (MODEL, {"num_heads": 5}, "num_heads=5 must divide model_dim=12."),
    (MODEL, {"ssm": SSMConfig(heads_per_kv=3)}, "heads_per_kv=3 must divide num_heads=2."),
    (
        MODEL,
        {"mixers": ("s4d",), "ssm": SSMConfig(feature_map="none")},
        "feature_map='none' changes nothing in S4D, which maps no input.",
    ),
    (
        MODEL,
        {"mixers": ("dual_linear",), "ssm": SSMConfig(denominator=True)},
        "denominator needs a readout by queries: a linear one has no scores to divide by.",
    ),
    (MODEL, {"num_heads": 4}, "head_dim=3 (model_dim / num_heads) must be even for rotary positions."),
    *at_least(COMPUTE, 0, "chunk_size"),
    *at_least(COMPUTE, 1, "loss_chunk"),
    unknown(COMPUTE, "dtype", "bfloat", "bfloat16"),
    unknown(COMPUTE, "backend", "chunkwis", "chunkwise"),
    unknown(COMPUTE, "remat", "blocks", "block"),
    *at_least(DATA, 1, "seq_len"),
    unknown(DATA, "documents", "rest", "reset"),
    *((DATA, {"weights": weights}, f"weights={weights} must be greater than 0.") for weights in ((1.0, 0.0), (-1.0,))),
    unknown(OPTIM, "name", "moun", "muon", "optimiser"),
    *positive(OPTIM, "peak_lr", "clip_norm", "eps", "ssm_lr_cap"),
    *at_least(OPTIM, 0, "warmup_steps", "final_lr", "weight_decay", "b1", "b2", "momentum"),
    *below(OPTIM, 1, "b1", "b2", "momentum"),
    *below(TRAIN, 2**31, "steps"),
    *at_least(CONFIG, 0, "seed"),
    *below(CONFIG, 2**63, "seed"),
    *at_least(
        TRAIN, 1, "steps", "batch_size", "accumulation", "log_every", "eval_every", "eval_batches",
        "checkpoint_every", "keep_latest", "sample_tokens",
    ),
    *at_least(TRAIN, 0, "keep_best", "ngram_orders"),
    (TRAIN, {"accumulation": 4}, "accumulation=4 must divide batch_size=6."),
    (CONFIG, {"optim": OptimConfig(peak_lr=1.0, warmup_steps=10)}, "warmup_steps=10 must not exceed steps=9."),
]  # fmt: skip


@pytest.mark.parametrize(("section", "change", "message"), BROKEN, ids=[message for _, _, message in BROKEN])
def test_broken_rule(section, change, message):
    assert dataclasses.replace(section) == section  # valid before the change
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(section, **change)


VALUES = {  # kind of a field -> values that it takes, with what is stored, and values that it refuses with their rule
    bool: ([(np.True_, True)], [1, 0.0, "True"], "must be True or False."),
    int: (
        [(np.int64(2), 2), (np.uint8(2), 2)],
        [2.0, 10.5, True, np.True_, np.float32(2), float("nan"), "2"],
        "must be a whole number.",
    ),
    float: (
        [(np.float32(0.5), 0.5), (np.float64(0.5), 0.5)],
        [True, "0.5", float("nan"), float("inf"), np.float32("inf"), 10**400, 0.5j],
        "must be a finite number.",
    ),
    str: ([], [3, b"bytes", ["a"]], "must be a string."),
    tuple[str, ...]: ([(["s4d"], ("s4d",))], ["s4d", {"s4d"}, 3], "must be a tuple, each element a string."),
    tuple[float, ...]: (
        [([1, np.float32(2)], (1.0, 2.0))],
        [1.0, "ab"],
        "must be a tuple, each element a finite number",
    ),
}


@pytest.mark.parametrize("section", [*frozen_sections(), IdealConfig(), MeshConfig()], ids=lambda x: type(x).__name__)
def test_every_field_is_of_its_type(section):
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            taken, refused, rule = [], [{}, 3], f"must be a {field.type.__name__}."
        else:
            taken, refused, rule = VALUES[field.type]
        for value in [*refused, None]:
            with pytest.raises(ValueError, match=re.escape(f"{field.name}={value!r} {rule}")):
                dataclasses.replace(section, **{field.name: value})
        for value, stored in taken:
            try:
                changed = getattr(dataclasses.replace(section, **{field.name: value}), field.name)
            except ValueError as error:  # of its range, or of what else the section holds
                assert rule not in str(error) and "np." not in str(error)
            else:
                assert (changed, type(changed)) == (stored, type(stored))
                assert json.loads(json.dumps(changed)) == (list(stored) if isinstance(stored, tuple) else stored)


def test_elements_of_tuples_are_of_their_type():
    for change, message in (
        ({"holdout": ["a", 3]}, "holdout[1]=3 must be a string."),
        ({"weights": (1.0, float("nan"))}, "weights[1]=nan must be a finite number."),
        ({"weights": (True,)}, "weights[0]=True must be a finite number."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            dataclasses.replace(DATA, **change)
    assert hash(dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, holdout=["a"])))


def test_the_bounds_themselves_are_valid():
    assert dataclasses.replace(MODEL, mixers=("s4d",), num_heads=4).head_dim == 3  # odd heads, no rotary positions
    assert SSMConfig(delta_min=0.1, delta_max=0.1, num_modes=1, conv_width=0).num_modes == 1
    assert OptimConfig(peak_lr=1.0, warmup_steps=0, final_lr=0.0, weight_decay=0.0, b1=0.0, b2=0.0).b1 == 0
    assert dataclasses.replace(CONFIG, optim=OptimConfig(peak_lr=1.0, warmup_steps=9)).optim.warmup_steps == 9
    assert dataclasses.replace(TRAIN, accumulation=6, keep_best=0).accumulation == 6


def nested(**changes):
    """CONFIG as nested dicts, with values put at dotted paths."""
    values = dataclasses.asdict(CONFIG)
    for path, value in changes.items():
        *sections, name = path.split("__")
        node = values
        for section in sections:
            node = node[section]
        node[name] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "key of config='sede' is not known. Did you mean 'seed'?"),
        ({"train__step": 1}, "key of config.train='step' is not known. Did you mean 'steps'?"),
        ({"model__ssm__num_mode": 1}, "key of config.model.ssm='num_mode' is not known. Did you mean 'num_modes'?"),
        ({"compute__backend": 3}, "config.compute: backend=3 must be a string."),
        ({"optim__peak_lr": "fast"}, "config.optim: peak_lr='fast' must be a finite number."),
        ({"model__mixers": "softmax"}, "config.model: mixers='softmax' must be a tuple, each element a string."),
        ({"seed": {"a": 1}}, "config: seed={'a': 1} must be a whole number."),
        ({"model__mixers": ["softmx"]}, "mixer='softmx' is not known. Did you mean 'softmax'?"),
        ({"compute__backend": "recurrant"}, "backend='recurrant' is not known. Did you mean 'recurrent'?"),
        ({"train__steps": 0}, "config.train: steps=0 must be at least 1."),
        ({"train__steps": 10.5}, "config.train: steps=10.5 must be a whole number."),
        ({"train": 3}, "config.train=3 must be a mapping with the settings of TrainConfig."),
        ({"model__ssm": []}, "config.model.ssm=[] must be a mapping with the settings of SSMConfig."),
    ],
)
def test_from_config_dict_names_key_and_path(changes, message):
    assert from_config_dict(nested()) == CONFIG
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config_dict(nested(**changes))


def test_configs_stored_before_a_setting_was_there():
    values = nested()
    for name in ("feature_map", "input_norms", "denominator", "a_init", "core", "write"):
        del values["model"]["ssm"][name]
    assert from_config_dict(values) == CONFIG
    assert from_config_dict(values).identity() == CONFIG.identity()


def test_missing_key():
    values = nested()
    del values["model"]["model_dim"]
    with pytest.raises(ValueError, match=r"config\.model: .*missing.*'model_dim'"):
        from_config_dict(values)


def test_identity_leaves_out_only_how_a_run_is_run():
    identity = CONFIG.identity()
    assert set(identity) == {"seed", "model", "data", "optim", "train"}
    assert identity["train"] == {"steps": 9, "batch_size": 6, "accumulation": 3}
    for name in ("model", "data", "optim"):
        paths = {"source", "more_sources", "tokenizer"} if name == "data" else {}
        values = dataclasses.asdict(getattr(CONFIG, name))
        assert identity[name] == {key: value for key, value in values.items() if key not in paths}
    assert identity["seed"] == 7

    free = {
        "log_every": 3, "eval_every": 2, "eval_batches": 5, "checkpoint_every": 4, "keep_latest": 7, "keep_best": 8,
        "ngram_orders": 1, "sample_prompt": "x", "sample_tokens": 3, "skip_not_finite": 2,
    }  # fmt: skip
    assert set(free) | set(identity["train"]) == {field.name for field in dataclasses.fields(TrainConfig)}
    for name, value in free.items():
        assert getattr(TRAIN, name) != value
        assert dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, **{name: value})).identity() == identity
    assert dataclasses.replace(CONFIG, compute=ComputeConfig()).identity() == identity
    assert dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2)).identity() == identity
    for name, value in {"steps": 10, "batch_size": 12, "accumulation": 2}.items():
        assert dataclasses.replace(CONFIG, train=dataclasses.replace(TRAIN, **{name: value})).identity() != identity
    assert dataclasses.replace(CONFIG, seed=8).identity() != identity


def test_mesh_sizes():
    for sizes in ({"fsdp": 0}, {"data": -2}, {"tensor": -1}):  # data is -1 already
        with pytest.raises(ValueError, match="must be at least 1 each, or -1 for one of them"):
            MeshConfig(**sizes)
    with pytest.raises(ValueError, match="slices=0 must be at least 1"):
        MeshConfig(slices=0)


def test_check_choice():
    for name in MIXERS:
        check_choice("mixer", name, MIXERS)
    with pytest.raises(ValueError, match=r"^x='zzz' is not known\. It must be one of abc, abd\.$"):  # nothing is near
        check_choice("x", "zzz", ("abc", "abd"))
