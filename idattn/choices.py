"""The names that settings may take, the errors for one that is not among them, and the classes behind names."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

BASES = ("s4d_inv", "s4d_lin", "uniform")  # how the frequencies of a state start
READOUTS = ("transpose", "hermitian", "real")
CORES = ("fixed", "clock")  # whether the steps of a state are alike, or set by the tokens
WRITES = ("add", "delta", "damped")  # whether values are added to a state, or correct what it answers to their key
OPTIMIZERS = ("adamw", "muon")
FEATURES = ("positive", "fourier", "softmax")  # random ones, of the ideal layer
FEATURE_MAPS = ("silu_l2", "none", "positive", "softmax")  # xi: that of eq. 10, the identity, or random features
CELLS: Mapping[str, str] = {  # the conditions of the paper's study (section 4), and where their classes are
    "interdomain": "idattn.nn.interdomain:Interdomain",
    "interdomain_norope": "idattn.nn.interdomain:InterdomainNoRope",
    "softmax": "idattn.nn.softmax:SoftmaxAttention",
    "single_query": "idattn.nn.interdomain:SingleQuery",
    "s4d": "idattn.nn.interdomain:S4D",
    "s4d_rope": "idattn.nn.interdomain:S4DRope",
    "dual_linear": "idattn.nn.interdomain:DualLinear",
}
PEERS: Mapping[str, str] = {  # linear attention with gates, to compare with
    "gla": "idattn.nn.gla:GatedLinearAttention",
    "mamba2": "idattn.nn.mamba2:Mamba2",
    "gated_deltanet": "idattn.nn.gated_deltanet:GatedDeltaNet",
}
CONTROLS: Mapping[str, str] = {  # what a part of the paper's layer is worth without the others
    "dual_linear_norope": "idattn.nn.interdomain:DualLinearNoRope",
    "single_query_norope": "idattn.nn.interdomain:SingleQueryNoRope",
    "linear": "idattn.nn.linear:LinearAttention",
    "softmax_conv": "idattn.nn.softmax_conv:ConvolvedSoftmaxAttention",
}
MIXERS: Mapping[str, str] = {**CELLS, "ideal": "idattn.nn.ideal:IdealAttention", **PEERS, **CONTROLS}
TRACKERS: Mapping[str, str] = {"wandb": "idattn.train.trackers:WeightsAndBiases"}


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError that names `value`, the nearest valid choice and all choices, unless `value` is one."""
    choices = tuple(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is not known.{hint} It must be one of {', '.join(choices)}.")


def find_mixer(name: str) -> Any:
    """The class of a token mixer, a subclass of `idattn.nn.Mixer`.

    Args:
      name: of `MIXERS`, or "module:Class" for a mixer of one's own.

    Raises:
      ValueError: there is none of this name, or its class lacks what a mixer must define.
    """
    return _find_class("mixer", name, MIXERS, "idattn.nn.Mixer")


def find_tracker(name: str) -> Any:
    """The class of an experiment tracker, a subclass of `idattn.train.Tracker`.

    Args:
      name: of `TRACKERS`, or "module:Class" for a tracker of one's own.

    Raises:
      ValueError: there is none of this name, or its class lacks what a tracker must define.
    """
    return _find_class("tracker", name, TRACKERS, "idattn.train.Tracker")


def _find_class(kind: str, name: str, known: Mapping[str, str], base_name: str) -> Any:
    """The subclass of a class of this package that a name of `known`, or "module:Class", means."""
    if ":" not in str(name):
        check_choice(kind, name, known)
    module, _, attribute = known.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind}={name!r} must be one of {', '.join(known)} or module:Class ({error}).") from error
    base = pkgutil.resolve_name(base_name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{kind}={name!r} must be a subclass of {base_name}.")
    if missing := getattr(found, "__abstractmethods__", None):
        raise ValueError(f"{kind}={name!r} must define {', '.join(sorted(missing))}; see {base_name}.")
    return found
