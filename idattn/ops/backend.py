"""The contract of backends: a module for each, which exposes one record, `BACKEND`, for `idattn.ops.api`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from idattn.ops.prepare import Rule as PrepareRule

DEFAULT_CHUNK_SIZE = 128
Rule = tuple[Callable[..., Any], Callable[..., Any]]  # (forward, backward), see `idattn.ops.chunks._attend`


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to run the op. It is either *chunked*, a pair `rule` of passes, or *whole*, with `interdomain` instead.

    A backend never falls back: what it cannot do is an error that names what can.

    Attributes:
      name: what users call it.
      rule: (forward, backward) over whole chunks, as `idattn.ops.chunks._attend` calls them.
      interdomain: (q, k, v, basis, initial_state, segments, *, readout) -> (o, state), differentiable by JAX.
      linear: (z, basis, c_out, initial_state, segments, *, chunk_size) -> (y, state), likewise; None where there is no
        linear readout.
      platforms: the platforms, of "cpu", "cuda", "rocm" and "tpu", on which "auto" takes it where it can run.
      requirement: (q, k, v, num_modes, chunk_size, dtype) -> what it would need of them, or None if it has all;
        `dtype` is the state's.
      default_chunk: tokens in a chunk where no number is asked for.
      cpu_chunk: likewise on CPUs, a part of `default_chunk`; None for that.
      clips_chunks: whether a chunk may be as short as a sequence that is shorter than `chunk_size`.
      prepare: how it prepares heads, on its platforms; None for `idattn.ops.prepare.COMPOSED`.
    """

    name: str
    rule: Rule | None = None
    interdomain: Callable[..., Any] | None = None
    linear: Callable[..., Any] | None = None
    platforms: tuple[str, ...] = ()
    requirement: Callable[..., str | None] = lambda q, k, v, num_modes, chunk_size, dtype: None
    default_chunk: int = DEFAULT_CHUNK_SIZE
    cpu_chunk: int | None = None
    clips_chunks: bool = True
    prepare: PrepareRule | None = None

    def __post_init__(self):
        if (self.rule is None) == (self.interdomain is None):
            raise ValueError(f"backend {self.name!r} must have either `rule` or `interdomain`.")

    def chunk(self, chunk_size: int | None, T: int) -> int:
        """Tokens in a chunk of a sequence of T.

        Raises:
          ValueError: `chunk_size` is below 1.
        """
        size = self.default_chunk if chunk_size is None else chunk_size
        if size < 1:
            raise ValueError(f"{chunk_size=} must be at least 1.")
        is_known = isinstance(T, int)  # else it is a dimension of jax.export, which no number is less than
        return min(size, T) if self.clips_chunks and is_known else size
