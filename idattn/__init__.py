"""Interdomain Attention in JAX: a token mixer whose queries read a fixed-size state by content.

    InterdomainAttention  the paper's layer (eq. 10-13), for use in any model
    load                  decoder, tokenizer and config of a checkpoint, as a `Trained`
    generate_text         texts continued by a decoder
    LanguageModel         the paper's decoder around any mixers, with the settings of `Config.model`
    Config                all settings of a run

The functions under the layer are in `idattn.ops`, and training is in `idattn.train`.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from glob import glob
from typing import TYPE_CHECKING, Any

from jaxlib.version import __version__ as _JAXLIB

if TYPE_CHECKING:
    from idattn.config import Config
    from idattn.inference import generate_text
    from idattn.nn import InterdomainAttention, LanguageModel
    from idattn.trained import Trained, load

__version__ = "0.1.0"
__all__ = ["Config", "InterdomainAttention", "LanguageModel", "Trained", "generate_text", "load"]
# Imported at first use: the layer needs nothing that training needs.
_MODULES = {
    "Config": "idattn.config",
    "InterdomainAttention": "idattn.nn",
    "LanguageModel": "idattn.nn",
    "Trained": "idattn.trained",
    "generate_text": "idattn.inference",
    "load": "idattn.trained",
}

# Programs for CPUs of these versions compute some sums of products wrongly, without a word (jax-ml/jax#39103). XLA
# reads its flags at its first program.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
if _JAXLIB in ("0.10.2", "0.11.0") and _YNN_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_YNN_FLAG}=".strip()


def _avoid_libtpu() -> None:
    """Keep JAX from loading libtpu where nothing but CPUs can be there: it prints alarms, and stack traces of signals.

    Where it is installed to compile with, it would be loaded only to find no TPU.
    """
    if importlib.util.find_spec("libtpu") is None:
        return
    import jax  # which sets the first of these variables where it finds no chip, and the second

    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if chosen or os.environ.get("TPU_SKIP_MDS_QUERY") != "1":
        return
    variables = {name for name in os.environ if name.startswith("TPU_")} - {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
    chips = [*glob("/dev/accel*"), *glob("/dev/vfio/[0-9]*")]
    plugins = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("jax_plugins")
    if not (variables or chips or plugins):
        jax.config.update("jax_platforms", "cpu")


_avoid_libtpu()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
