"""Using a trained model: tokens read, scored and written (`decoder`), text (`text`), files of a disk and of the hub."""

from idattn.inference.decoder import Context, Decoder
from idattn.inference.files import load_context, load_weights, save_context, save_weights
from idattn.inference.hub import pull, push
from idattn.inference.sampling import Sampling, make_sampling
from idattn.inference.text import Completion, generate, generate_text, right_pad

__all__ = [
    "Completion",
    "Context",
    "Decoder",
    "Sampling",
    "generate",
    "generate_text",
    "load_context",
    "load_weights",
    "make_sampling",
    "pull",
    "push",
    "right_pad",
    "save_context",
    "save_weights",
]
