"""What depends on the platform that is compiled for: programs that one can run, functions that one keeps apart."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir

_NAMES = {"tpu": "TPU", "cuda": "NVIDIA GPU"}

_requires_platform = Primitive("requires_platform")
_requires_platform.def_abstract_eval(lambda **_: ShapedArray((), jnp.int32))
_requires_platform.def_impl(lambda **parameters: jax.jit(functools.partial(_requires_platform.bind, **parameters))())


def _lower(compiled_for, ctx, *, platform: str, backend: str):
    if compiled_for != platform:
        raise NotImplementedError(
            f"backend={backend!r} was asked for, and this is compiled for another platform than {_NAMES[platform]}; "
            f"use backend='chunkwise', or 'auto', which takes what can run."
        )
    return mlir.lower_fun(lambda: jnp.zeros((), jnp.int32), multiple_results=False)(ctx)


mlir.register_lowering(_requires_platform, functools.partial(_lower, None))
for _platform in _NAMES:
    mlir.register_lowering(_requires_platform, functools.partial(_lower, _platform), platform=_platform)


def requires(platform: str, backend: str) -> jax.Array:
    """0 where it is compiled for the platform, "tpu" or "cuda"; NotImplementedError, of the backend, elsewhere."""
    return _requires_platform.bind(platform=platform, backend=backend)


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays whose results XLA for CPUs computes once, and not again inside of all that reads them.

    For rules of derivatives that are written out.
    """

    @jax.jit
    def plain(*arguments):
        with set_xla_metadata(inlineable=None):
            return function(*arguments)

    def on_cpu(*arguments):
        with set_xla_metadata(inlineable="false"):
            return plain(*arguments)

    return lambda *arguments: jax.lax.platform_dependent(*arguments, cpu=on_cpu, default=function)
