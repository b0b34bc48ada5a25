"""Settings of all tests: quick compilation except where a test is about the compiled program.

A test that compiles for TPUs takes the fixture `libtpu`, one that compiles for GPUs `gpu_compile`; either gives it the
marker of its name.
"""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, which is there to compile with, would look for a TPU
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # and the CUDA plugin for a GPU, as JAX finds plugins

from jaxlib.version import __version__ as JAXLIB  # noqa: E402

# The emitters take two thirds of the time that XLA takes to compile for a CPU; each part of a program that is compiled
# by itself takes time too, and the workers leave no core idle that could compile it.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if JAXLIB.startswith("0.10."):  # XLA ends a process that names a flag which it has no longer
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jax.extend.backend import clear_backends  # noqa: E402

from idattn.plan.compiler import load_compiler  # noqa: E402
from idattn.plan.gpus import find_plugin, load_gpu_compiler  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)  # compiles several times faster; numbers are the same
gc.set_threshold(100_000, 20, 100)  # tracing makes objects in masses: Python would search them a sixth of the time
jax.config.update("jax_numpy_rank_promotion", "raise")  # users may have it so, and shapes that differ are faults
settings.register_profile("idattn", deadline=None, derandomize=True)  # the same examples in every run, however slow
settings.load_profile("idattn")


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items):
    # Runs of programs first: no worker should begin one when the others are about to end.
    items.sort(key=lambda item: item.path.parent.name not in ("train", "launch"))
    for item in items:
        for compiler in {"libtpu", "gpu_compile"}.intersection(item.fixturenames):
            item.add_marker(compiler)


@pytest.fixture(scope="session")
def libtpu():
    """The TPU's compiler."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux on x86-64")
    load_compiler()


@pytest.fixture(scope="session")
def gpu_compile():
    """The GPUs' compiler."""
    if not find_plugin():
        pytest.skip("JAX's CUDA plugin is for Linux")
    load_gpu_compiler()


@pytest.fixture(scope="module")
def optimised():
    """Compile with all optimisations, as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module")
def eight_devices():
    """Eight simulated devices rather than one."""
    clear_backends()
    jax.config.update("jax_num_cpu_devices", 8)
    yield jax.devices()
    clear_backends()
    jax.config.update("jax_num_cpu_devices", 1)
