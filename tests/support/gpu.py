"""The interpreter of GPU kernels, under the names that it has in JAX's public modules from 0.12 on."""

from typing import Any

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

    _CHECKS = {"detect_races": True}
except ImportError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    _CHECKS = {}


def interpreter() -> Any:
    """Its settings: memory is NaN until it is written, and races are errors where it finds them."""
    return InterpretGPUParams(uninitialized_memory="nan", **_CHECKS)
