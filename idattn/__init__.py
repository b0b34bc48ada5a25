"""Interdomain Attention in JAX: a token mixer whose queries read a fixed-size state by content.

    InterdomainAttention  the paper's layer (eq. 10-13), for use in any model
    load                  decoder, tokenizer and config of a checkpoint, as a `Trained`
    generate_text         texts continued by a decoder
    LanguageModel         the paper's decoder around any mixers, with the settings of `Config.model`
    Config                all settings of a run

The functions under the layer are in `idattn.ops`, and training is in `idattn.train`.
"""

import importlib
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
