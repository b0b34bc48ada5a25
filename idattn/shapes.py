"""The one legend of array dimensions, and the type aliases written with it.

    B  sequences in a batch            H  query heads
    T  tokens in a sequence            G  key-value heads (G divides H)
    D  model width                     J  query heads for each key-value head, H / G
    V  vocabulary size                 R  features of a key (and of a query)
    F  width of the MLP                E  channels of a value
    L  layers                          W  channels that a state holds: R + E
                                       M  modes of the state
                                       K  tokens in a chunk
                                       N  chunks in a sequence

Einsum letters follow it in lower case: s is a second token index next to t, l a lag between tokens, n and o second
indices of modes next to m, p the plane (real, imaginary), i and j tokens' distances in w(i, j). Complex arrays on hot
paths are real planes: an axis of length 2 (real, imaginary) before the modes or, flattened with them, an axis of length
2M (`idattn.ops.planes`).
"""

from typing import TypeAlias

from jax import Array
from jaxtyping import Float, Integer

Queries: TypeAlias = Float[Array, "B T H R"]
Keys: TypeAlias = Float[Array, "B T G R"]
Values: TypeAlias = Float[Array, "B T G E"]
Outputs: TypeAlias = Float[Array, "B T H E"]
State: TypeAlias = Float[Array, "B G W M2"]  # M2 = 2M; the rows of the keys' features before those of the values
SegmentIds: TypeAlias = Integer[Array, "B T"]
