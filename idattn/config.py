"""Every setting of a run as frozen dataclasses, checked once when they are built.

A config file (`configs/*.py`) builds a `Config` and returns it as an `ml_collections.ConfigDict`, the command
line changes single values of it, and `from_config_dict` turns the result back into a checked `Config`.
[P] marks values that the paper states (arXiv 2605.24330), [O] values that it leaves open and we chose.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from idattn.checks import check_at_least, check_below, check_positive, check_types
from idattn.choices import (
    BASES,
    CORES,
    FEATURE_MAPS,
    FEATURES,
    MIXERS,
    OPTIMIZERS,
    READOUTS,
    WRITES,
    check_choice,
    find_mixer,
)
from idattn.ops.adaptive import check_write
from idattn.ops.api import AUTO, BACKENDS

REMAT: Mapping[str, str] = {
    "none": "nothing",
    "dots": "all but the results of matrix products with weights",
    "mixer": "all but the mixers' outputs, so that no op runs forward twice",
    "block": "all but the blocks' inputs",
}


@dataclass(frozen=True, kw_only=True)
class SSMConfig:
    """The state of the interdomain, single-query, dual-linear and S4D mixers (section 3.3 of the paper)."""

    num_modes: int = 64  # M, basis functions of the state [P]
    heads_per_kv: int = 1  # query heads that share one state (H / n_kv); 1 in the paper's scaling runs [P]
    conv_width: int = 4  # taps of the causal depthwise convolutions [P]; 0 for none
    # xi, SiLU of unit length [P: eq. 10]; or "none", the identity; or as many random features as channels, fixed by
    # ideal.seed: "positive", of a Gaussian kernel (eq. 3-5), or "softmax", of softmax's.
    feature_map: str = "silu_l2"
    input_norms: bool = True  # eq. 12 [P]; False: the state reads xi(k) and v, or a and b, as they are
    core: str = "fixed"  # or "clock", Delta times exp of a bounded projection of the token; interdomain only
    write: str = "add"  # or "delta" or "damped", values correct what the state answers to their key; interdomain only
    readout: str = "transpose"  # Re of xi(q)^T U^T Gamma; or "hermitian", "real" [O]
    a_init: str = "s4d_inv"  # start of the frequencies [P]; or "s4d_lin", pi n, or "uniform", 2 pi n / (M Delta)
    c: str = "full"  # "full" (M, M), "diagonal" (M,) or "identity" (no parameter) [P]
    c_init: str = "normal"  # complex normal, or "eye", a multiple of the identity [O]
    c_init_scale: float = 1 / 16  # total variance of an output mode of C at the start; "eye": its square root [O]
    delta_min: float = 1e-3  # Delta starts log-uniform in [delta_min, delta_max] [P]
    delta_max: float = 0.1
    rope_position: str = "before"  # RoPE "before" the feature map [P], or "after" it
    denominator: bool = False  # divide by what the same readout makes of values of 1, as in eq. 8 [P: no, eq. 13]
    output_gate: bool = False  # multiply the heads' outputs by SiLU(W_g x) [P: off]
    norm_bias_init: float = 0.0  # start of the biases b_k, b_v of eq. 12 [O]

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "num_modes", "heads_per_kv")
        check_at_least(self, 0, "conv_width")
        check_positive(self, "c_init_scale", "delta_min")
        if not self.delta_min <= self.delta_max:
            raise ValueError(f"delta_min={self.delta_min} must not exceed delta_max={self.delta_max}.")
        if self.norm_bias_init and not self.input_norms:
            raise ValueError(f"norm_bias_init={self.norm_bias_init} needs input_norms, whose biases start there.")
        check_choice("core", self.core, CORES)
        check_choice("write", self.write, WRITES)
        check_choice("readout", self.readout, READOUTS)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        if self.write != "add":
            check_write(self.write, self.readout)
            if self.feature_map != "silu_l2":
                raise ValueError(
                    f"write={self.write!r} needs feature_map='silu_l2', whose keys have length 1, "
                    f"not {self.feature_map!r}."
                )
            if self.denominator:
                raise ValueError(f"denominator needs write='add', as {self.write!r} does not add up values of 1.")
        check_choice("a_init", self.a_init, BASES)
        check_choice("c", self.c, ("full", "diagonal", "identity"))
        check_choice("c_init", self.c_init, ("normal", "eye"))
        check_choice("rope_position", self.rope_position, ("before", "after"))


@dataclass(frozen=True, kw_only=True)
class IdealConfig:
    """The random features of the ideal mixer (section 3.1 of the paper): drawn from the seed, never trained."""

    # Or "fourier", whose denominators may be below zero [P: either]; or "softmax", of softmax's kernel, not a Gaussian.
    features: str = "positive"
    num_features: int = 64  # R [O]
    seed: int = 0  # of the frequencies, which all layers share [O]
    floor: float = 1e-6  # the denominators up to which the values' mean is the output [O]

    def __post_init__(self):
        check_types(self)
        check_choice("features", self.features, FEATURES)
        check_at_least(self, 1, "num_features")
        check_at_least(self, 0, "seed")
        check_positive(self, "floor")
        if self.features == "fourier" and self.num_features % 2:
            raise ValueError(f"num_features={self.num_features} must be even: a cosine and a sine for each frequency.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder whose token mixer may differ by layer (section 4 of the paper)."""

    vocab_size: int  # V
    model_dim: int  # D
    num_layers: int  # L
    num_heads: int  # H; heads are D / H wide
    mlp_dim: int  # F, width of the SwiGLU
    mixers: tuple[str, ...] = ("interdomain",)  # names of MIXERS or "module:Class", repeated over the depth (hybrids)
    rope_base: float = 10_000.0  # wavelengths of the rotary positions [O]
    norm_eps: float = 1e-5  # added to the mean square in every RMSNorm [O]
    init_std: float = 0.02  # of every matrix; residual outputs start at init_std / sqrt(2 L) [O]
    ssm: SSMConfig = field(default_factory=SSMConfig)  # of the ideal mixer only num_modes
    ideal: IdealConfig = field(default_factory=IdealConfig)

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "vocab_size", "model_dim", "num_layers", "num_heads", "mlp_dim")
        check_positive(self, "rope_base", "norm_eps", "init_std")
        if not self.mixers:
            raise ValueError(f"mixers={self.mixers} must name at least one mixer of {', '.join(MIXERS)}.")
        mixers = [find_mixer(name) for name in self.mixers]
        if self.num_layers % len(self.mixers):
            raise ValueError(
                f"num_layers={self.num_layers} must be a multiple of the {len(self.mixers)} mixers of the pattern "
                f"{self.mixers}."
            )
        if self.model_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide model_dim={self.model_dim}.")
        if self.num_heads % self.ssm.heads_per_kv:
            raise ValueError(f"heads_per_kv={self.ssm.heads_per_kv} must divide num_heads={self.num_heads}.")
        for mixer in mixers:
            mixer.check(self)

    @property
    def head_dim(self) -> int:
        """Width of a head: the features R of a key and the channels E of a value."""
        return self.model_dim // self.num_heads

    @property
    def state_width(self) -> int:
        """R + E, the features and channels in a state, and a channel for the denominator where there is one."""
        return 2 * self.head_dim + self.ssm.denominator

    @property
    def num_kv_heads(self) -> int:
        """G, states per SSM layer."""
        return self.num_heads // self.ssm.heads_per_kv

    @classmethod
    def tiny(cls, *mixers: str, **changes: Any) -> "ModelConfig":
        """The smallest model worth testing: two heads, odd sizes, one layer for each mixer of the pattern."""
        values: dict[str, Any] = dict(
            vocab_size=37,
            model_dim=12,
            num_layers=max(2, len(mixers)),
            num_heads=2,
            mlp_dim=20,
            mixers=mixers or ("interdomain",),
            ssm=SSMConfig(num_modes=5),
        )
        return cls(**(values | changes))


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed: changes speed, memory and rounding, never which model it is."""

    dtype: str = "bfloat16"  # of activations and matrix products; parameters, states and the loss are float32
    backend: str = "auto"  # of idattn.ops.interdomain_attention
    chunk_size: int = 0  # K, tokens in a chunk of the op; 0: by platform and backend
    residual_in_float32: bool = False  # the residual stream, to which layers add, instead of in `dtype` [O]
    remat: str = "none"  # what the backward pass recomputes, see REMAT
    scan_layers: bool = True  # False: a step writes the layers out, not as a loop; faster on TPUs, longer to compile
    loss_chunk: int = 1024  # tokens of a sequence batch whose logits exist at a time

    def __post_init__(self):
        check_types(self)
        check_choice("dtype", self.dtype, ("bfloat16", "float32", "float64"))
        check_choice("backend", self.backend, (AUTO, *BACKENDS))
        check_choice("remat", self.remat, REMAT)
        check_at_least(self, 0, "chunk_size")
        check_at_least(self, 1, "loss_chunk")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh (`idattn.sharding`): changes speed and memory, never which model it is."""

    data: int = -1  # rows of the batch, parameters copied; -1: all devices that remain
    fsdp: int = 1  # rows of the batch, parameters split
    sequence: int = 1  # tokens
    tensor: int = 1  # heads, channels of the MLP, vocabulary
    slices: int = 1  # TPU slices, joined by the data-centre network, over which `data` is laid

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "slices")
        sizes = {name: size for name, size in dataclasses.asdict(self).items() if name != "slices"}
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            raise ValueError(f"mesh={sizes} must be at least 1 each, or -1 for one of them.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes windows of tokens."""

    # Text of `idattn.data.Corpus`, held in memory; or a prepared folder; or mqar:pairs=P,rows=N, rows of
    # `idattn.data.mqar_rows` in which only the answers count. A path that begins like a tag is spelt ./mqar:x.
    source: str = "austen"
    more_sources: tuple[str, ...] = ()  # further prepared folders, to be mixed with `source`
    weights: tuple[float, ...] = ()  # of a mixture: the share of the windows from `source` and from each further folder
    holdout: tuple[str, ...] = ("persuasion",)  # ids of a text's documents to validate on; () for folders
    # Or what `idattn.data.load_tokenizer` takes, for a prepared folder that folder; or bpe:N, a BPE of N pieces that is
    # trained on the text that the run trains on, 50M characters of it at most.
    tokenizer: str = "bytes"
    seq_len: int  # T, tokens in a window
    documents: str = "reset"  # state, convolutions, attention and positions restart at borders; or "ignore" them [O]

    def __post_init__(self):
        check_types(self)
        self._read_older_spellings()
        check_at_least(self, 1, "seq_len")
        check_choice("documents", self.documents, ("reset", "ignore"))
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must be greater than 0.")
        count = 1 + len(self.more_sources)
        if len(self.weights) != count and (self.weights or count > 1):
            sources = (self.source, *self.more_sources)
            raise ValueError(f"weights={self.weights} must be one for each of the {count} sources {sources}.")

    def _read_older_spellings(self) -> None:
        """Stored configs may have source="A,B" for a mixture, and "mqar:PAIRS,ROWS"."""
        if not self.more_sources and len(self.weights) > 1 and self.source.count(",") == len(self.weights) - 1:
            source, *more_sources = self.source.split(",")
            object.__setattr__(self, "source", source)
            object.__setattr__(self, "more_sources", tuple(more_sources))
        if match := re.fullmatch(r"mqar:(\d+),(\d+)", self.source):
            object.__setattr__(self, "source", f"mqar:pairs={match[1]},rows={match[2]}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW or Muon, with a separate group for the SSM parameters (appendix A.2 of the paper)."""

    name: str = "adamw"  # [P]; or "muon", which orthogonalises the updates of the layers' matrices
    peak_lr: float
    warmup_steps: int  # linear from 0; then cosine to final_lr at the last step
    final_lr: float = 1e-5  # [P]
    weight_decay: float = 0.1  # on matrices and embeddings only [P; O]
    b1: float = 0.9  # [O]
    b2: float = 0.95  # [O]
    eps: float = 1e-8  # [O]
    momentum: float = 0.95  # of Muon, with Nesterov's correction [O]
    clip_norm: float = 1.0  # of the global gradient [P]
    ssm_lr_cap: float = 1e-3  # peak learning rate of the SSM group is min(peak_lr, ssm_lr_cap), no decay [P]

    def __post_init__(self):
        check_types(self)
        check_choice("optimiser", self.name, OPTIMIZERS)
        check_positive(self, "peak_lr", "clip_norm", "eps", "ssm_lr_cap")
        check_at_least(self, 0, "warmup_steps", "final_lr", "weight_decay", "b1", "b2", "momentum")
        check_below(self, 1, "b1", "b2", "momentum")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of a training run."""

    steps: int  # optimiser steps
    batch_size: int  # sequences in an optimiser step
    accumulation: int = 1  # equal parts of the batch that run one after another
    skip_not_finite: int = 0  # steps whose loss or gradient is not finite that are left out; one more stops the run
    log_every: int = 10  # steps
    eval_every: int = 500  # steps; always after the last
    eval_batches: int = 64  # validation batches of an evaluation at most
    checkpoint_every: int = 500  # steps; always after the last
    keep_latest: int = 2  # the newest checkpoints
    keep_best: int = 1  # checkpoints with the lowest validation loss
    # n-grams of order 1 to this many, to print beside the validation loss; 0 and for prepared folders: none
    ngram_orders: int = 0
    sample_prompt: str = ""  # print a continuation of this text after training; empty: none
    sample_tokens: int = 400

    def __post_init__(self):
        check_types(self)
        check_at_least(
            self, 1, "steps", "batch_size", "accumulation", "log_every", "eval_every", "eval_batches",
            "checkpoint_every", "keep_latest", "sample_tokens",
        )  # fmt: skip
        check_at_least(self, 0, "keep_best", "ngram_orders", "skip_not_finite")
        check_below(self, 2**31, "steps")  # which are counted in int32
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} must divide batch_size={self.batch_size}.")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    seed: int = 42  # of the parameters and of the data order [P]
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 0, "seed")
        check_below(self, 2**63, "seed")
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(f"warmup_steps={self.optim.warmup_steps} must not exceed steps={self.train.steps}.")

    def identity(self) -> dict[str, Any]:
        """The settings that make a run what it is; the others may change when it is resumed.

        Paths do not count: a run's data and tokenizer are compared by content (`idattn.data.digests`).
        """
        values = dataclasses.asdict(self)
        del values["compute"], values["mesh"]
        for name in ("source", "more_sources", "tokenizer"):
            del values["data"][name]
        values["train"] = {name: values["train"][name] for name in ("steps", "batch_size", "accumulation")}
        return values

    def differences(self, stored: "Config") -> list[str]:
        """Where the identity of another config is not that of this one, "name: VALUE there, VALUE now" each."""
        there, now = (flatten_dict(config.identity(), sep=".") for config in (stored, self))
        return [f"{name}: {there[name]!r} there, {now[name]!r} now" for name in now if there[name] != now[name]]


def quickstart() -> Config:
    """An interdomain model of 1.4M parameters, half of them a vocabulary, on five Austen novels: minutes on two cores.

    It was tuned on Northanger Abbey, after training on the four novels that are not Persuasion.
    """
    return Config(
        model=ModelConfig(
            vocab_size=2048, model_dim=128, num_layers=4, num_heads=4, mlp_dim=384,
            ssm=SSMConfig(num_modes=32, delta_min=8e-3),  # 2 / T: no mode outlasts a window by far
        ),
        data=DataConfig(tokenizer="bpe:2048", seq_len=256),
        optim=OptimConfig(name="muon", peak_lr=5e-3, warmup_steps=20, final_lr=0.0),
        train=TrainConfig(
            steps=400, batch_size=8, eval_every=200, checkpoint_every=200, ngram_orders=7,
            eval_batches=100,  # more than there are: all of Persuasion
            sample_prompt="It was a truth", sample_tokens=150,
        ),
        compute=ComputeConfig(dtype="float32", scan_layers=False),  # a tenth faster, and compiled in seconds
    )  # fmt: skip


def to_config_dict(config: Config) -> ConfigDict:
    """The config as a locked ConfigDict, which the command line can change value by value."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(values: Mapping[str, Any] | ConfigDict) -> Config:
    """A checked Config from a ConfigDict or nested dict.

    Raises:
      ValueError: a key is unknown (the nearest valid one is named) or missing, a value breaks its rule, or `values`
        and its sections are not mappings.
    """
    return _build(Config, values, "config")


def _build(section: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping | ConfigDict):
        raise ValueError(f"{path}={values!r} must be a mapping with the settings of {section.__name__}.")
    kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(section)}
    for key in values:
        check_choice(f"key of {path}", key, kinds)
    arguments = {
        name: _build(kinds[name], value, f"{path}.{name}") if dataclasses.is_dataclass(kinds[name]) else value
        for name, value in values.items()
    }
    try:
        return section(**arguments)
    except (TypeError, ValueError) as error:  # a TypeError for a missing key
        raise ValueError(f"{path}: {error}") from None
