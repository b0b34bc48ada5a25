"""The names that settings may take, and the error for one that is not among them."""

import difflib
from collections.abc import Iterable

BACKENDS = ("auto", "recurrent", "fft", "associative", "chunkwise", "pallas_tpu")
READOUTS = ("transpose", "hermitian", "real")
FEATURES = ("positive", "fourier")  # of the ideal layer


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a ValueError that names `value`, the nearest valid choice and all choices, unless `value` is one."""
    choices = tuple(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is not known.{hint} It must be one of {', '.join(choices)}.")
