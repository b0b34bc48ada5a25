"""Pure array functions: the op, its decode step, the parameters of its basis, and the softmax it is held against."""

from idattn.ops.api import interdomain_attention, linear_readout, linear_step, step, transfer
from idattn.ops.discretize import Basis
from idattn.ops.softmax import softmax_attention

__all__ = ["Basis", "interdomain_attention", "linear_readout", "linear_step", "softmax_attention", "step", "transfer"]
