"""The interpreter of GPU kernels, under the name that it has in JAX's public modules from 0.12 on."""

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

__all__ = ["InterpretGPUParams"]
