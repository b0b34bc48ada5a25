"""Pure array functions: the op, its variants, their decode steps, the basis, the ideal layer, and softmax."""

from idattn.ops.adaptive import adaptive_attention, adaptive_step
from idattn.ops.api import BACKENDS, interdomain_attention, linear_readout, linear_step, prepare_heads, step, transfer
from idattn.ops.backend import Backend
from idattn.ops.discretize import Basis
from idattn.ops.gated import gated_attention, gated_step
from idattn.ops.ideal import IdealState, draw_frequencies, ideal_attention, ideal_step, random_features
from idattn.ops.segments import Segments, find_segments
from idattn.ops.softmax import softmax_attention

__all__ = [
    "BACKENDS", "Backend", "Basis", "IdealState", "Segments", "adaptive_attention", "adaptive_step",
    "draw_frequencies", "find_segments", "gated_attention", "gated_step", "ideal_attention", "ideal_step",
    "interdomain_attention", "linear_readout", "linear_step", "prepare_heads", "random_features", "softmax_attention",
    "step", "transfer",
]  # fmt: skip
