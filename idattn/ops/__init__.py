"""Pure array functions of the layer: the op, its decode step, and the parameters of its basis."""

from idattn.ops.api import interdomain_attention, linear_readout, linear_step, step, transfer
from idattn.ops.discretize import Basis

__all__ = ["Basis", "interdomain_attention", "linear_readout", "linear_step", "step", "transfer"]
