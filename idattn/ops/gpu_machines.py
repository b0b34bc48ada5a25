"""The machines that the kernels of `idattn.ops.gpu_kernels` run on: the few operations that depend on the GPU.

Products, copies between global and shared memory (SMEM), and tiles of registers that are written to SMEM with one
distance of rows and read with another.
"""

from inspect import signature
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

newer: Any = plgpu  # for names that jax has from 0.12 on


def swizzle(rows: int, columns: int) -> int:
    """The elements of 16 bits by which a matrix is swizzled: the most that divide both its dimensions."""
    return next(elements for elements in (64, 32, 16) if rows % elements == 0 and columns % elements == 0)


def _load(ref, layout):
    index = ((),) if "idx" in signature(plgpu.load).parameters else ()  # until jax 0.12
    return plgpu.load(ref, *index, layout=layout, optimized=False)


class Hopper:
    """Products by wgmma: the left operand in registers, the right one in SMEM, loaded by TMA."""

    def matrices(self, count: int, rows: int, columns: int, dtype):
        """Shared memory for matrices, one below the other, that are right operands or are loaded."""
        elements = swizzle(rows, columns)
        # jax 0.12 declares them as protocols without an implementation of all methods.
        tiling = plgpu.TilingTransform((8, elements))  # pyright: ignore[reportAbstractUsage]
        swizzling = plgpu.SwizzleTransform(2 * elements)  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM((count * rows, columns), dtype, transforms=(tiling, swizzling))

    def load(self, pairs, barrier):
        """Copy matrices from global to shared memory: pairs (source, target), as many as `barrier` has arrivals."""
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)

    def read(self, ref, *, column: bool = False):
        """A tile, (rows, columns), from SMEM or global memory; or, `column`, one number for each row."""
        layout = plgpu.Layout.WGMMA
        return _load(ref, layout.reduce(1) if column else layout)

    def dot(self, columns: int, *products):
        """The float32 sum of products (rows, columns): of a in registers and b in SMEM, or b^T where `transposed`."""

        def accumulate(sums):
            for a, b, transposed in products:
                plgpu.wgmma(sums, a, b.transpose((1, 0)) if transposed else b)
            return sums[...]

        return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((products[0][0].shape[0], columns), jnp.float32))

    def write_rows(self, value, buffer, start, pitch: int):
        """Write a tile to a flat buffer, its rows `pitch` elements apart."""
        rows, columns = value.shape
        buffer.at[pl.ds(start, rows * pitch)].reshape(rows, pitch).at[:, pl.ds(0, columns)][...] = value

    def read_rows(self, buffer, start, pitch: int, shape):
        """Read a tile from a flat buffer, its rows `pitch` elements apart; `pitch` and `start` may be odd."""
        rows, columns = shape
        view = buffer.at[pl.ds(start, rows * pitch)].reshape(rows, pitch).at[:, pl.ds(0, columns)]
        # WGMMA's layout, element by element instead of in pairs.
        value = _load(view, plgpu.Layout._WGMMA_ACC_32BIT)
        return plgpu.layout_cast(value, plgpu.Layout.WGMMA)

    def iota(self, shape, axis: int):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def store(self, value, buffer, target):
        """Begin to write a tile to global memory, by way of `buffer` in SMEM; `finish` waits until all is written."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target)

    def finish(self):
        plgpu.wait_smem_to_gmem(0)


class Ampere(Hopper):
    """Products by mma, both operands in registers: read from SMEM, the left one by way of it. From jax 0.12."""

    def matrices(self, count: int, rows: int, columns: int, dtype):
        return plgpu.SMEM((count * rows, columns), dtype)

    def load(self, pairs, barrier):
        for source, target in pairs:
            newer.store(target, self.read(source), optimized=False)

    def dot(self, columns: int, *products):
        rows, dtype = products[0][0].shape[0], products[0][0].dtype
        sums = plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), newer.Layout.MMA_ACC(dtype))
        for a, b, transposed in products:

            def as_left(buffer, a=a):
                newer.store(buffer, a, optimized=False)
                return _load(buffer, newer.Layout.MMA_LHS(dtype))

            left = pl.run_scoped(as_left, plgpu.SMEM(a.shape, dtype))
            right = _load(b.transpose((1, 0)) if transposed else b, newer.Layout.MMA_RHS(dtype))
            sums = newer.mma(sums, left, right)
        return plgpu.layout_cast(sums, plgpu.Layout.WGMMA)

    def store(self, value, buffer, target):
        newer.store(target, value, optimized=False)

    def finish(self):
        pass


class Interpreted(Hopper):
    """Hopper's on a CPU, for tests: what Pallas does not interpret is done with arrays, at the same addresses."""

    def matrices(self, count: int, rows: int, columns: int, dtype):
        return plgpu.SMEM((count * rows, columns), dtype)

    def read(self, ref, *, column: bool = False):
        return ref[...]

    def dot(self, columns: int, *products):
        total = 0
        for a, b, transposed in products:
            dimensions = (((1,), (int(transposed),)), ((), ()))
            total += lax.dot_general(
                a, b[...], dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
        return total

    def write_rows(self, value, buffer, start, pitch: int):
        rows, columns = value.shape
        padding = lax.full((rows, pitch - columns), jnp.nan, value.dtype)
        flat = lax.reshape(lax.concatenate([value, padding], 1), (rows * pitch,))
        buffer[...] = lax.dynamic_update_slice(buffer[...], flat, (start,))

    def read_rows(self, buffer, start, pitch: int, shape):
        rows, columns = shape
        return lax.reshape(lax.dynamic_slice(buffer[...], (start,), (rows * pitch,)), (rows, pitch))[:, :columns]

    def iota(self, shape, axis: int):
        return lax.broadcasted_iota(jnp.int32, shape, axis)
