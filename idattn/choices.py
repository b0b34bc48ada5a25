"""The names that settings may take, the errors for one that is not among them, and the classes of mixers."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

BASES = ("s4d_inv", "s4d_lin", "uniform")  # how the frequencies of a state start
READOUTS = ("transpose", "hermitian", "real")
FEATURES = ("positive", "fourier")  # of the ideal layer
CELLS: Mapping[str, str] = {  # the conditions of the paper's study (section 4), and where their classes are
    "interdomain": "idattn.nn.interdomain:Interdomain",
    "interdomain_norope": "idattn.nn.interdomain:InterdomainNoRope",
    "softmax": "idattn.nn.softmax:SoftmaxAttention",
    "single_query": "idattn.nn.interdomain:SingleQuery",
    "s4d": "idattn.nn.interdomain:S4D",
    "s4d_rope": "idattn.nn.interdomain:S4DRope",
    "dual_linear": "idattn.nn.interdomain:DualLinear",
}
MIXERS: Mapping[str, str] = {**CELLS, "ideal": "idattn.nn.ideal:IdealAttention"}


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
    if ":" not in str(name):
        check_choice("mixer", name, MIXERS)
    module, _, attribute = MIXERS.get(name, name).partition(":")
    try:
        mixer = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"mixer={name!r} must be one of {', '.join(MIXERS)} or module:Class ({error}).") from error
    base = importlib.import_module("idattn.nn.mixer").Mixer
    if not (isinstance(mixer, type) and issubclass(mixer, base)):
        raise ValueError(f"mixer={name!r} must be a subclass of idattn.nn.Mixer.")
    if mixer.__abstractmethods__:
        raise ValueError(
            f"mixer={name!r} must define {', '.join(sorted(mixer.__abstractmethods__))}; see idattn.nn.Mixer."
        )
    return mixer
