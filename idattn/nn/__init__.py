"""Flax (nnx) modules: the layer, the mixers it is compared with, and the language model."""

from idattn.nn.documents import Documents
from idattn.nn.ideal import IdealAttention
from idattn.nn.interdomain import InterdomainAttention
from idattn.nn.layers import param
from idattn.nn.lm import LanguageModel, ModelState, model_specs
from idattn.nn.mixer import LayerState, Memory, Mixer
from idattn.nn.softmax import SoftmaxAttention
from idattn.nn.ssm import SSMMixer

__all__ = [
    "Documents", "IdealAttention", "InterdomainAttention", "LanguageModel", "LayerState", "Memory", "Mixer",
    "ModelState", "SSMMixer", "SoftmaxAttention", "model_specs", "param",
]  # fmt: skip
