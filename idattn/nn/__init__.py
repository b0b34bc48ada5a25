"""Flax (nnx) modules: the layer, the mixers it is compared with, and the language model."""

from idattn.nn.ideal import IdealAttention
from idattn.nn.lm import LanguageModel, model_specs
from idattn.nn.softmax import SoftmaxAttention
from idattn.nn.ssm import InterdomainAttention, SSMMixer

__all__ = ["IdealAttention", "InterdomainAttention", "LanguageModel", "SSMMixer", "SoftmaxAttention", "model_specs"]
