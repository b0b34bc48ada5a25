"""The one legend of array dimensions, and the type aliases written with it.

    B  sequences in a batch            H  query heads
    T  tokens in a sequence            G  key-value heads (G divides H)
    D  model width                     R  features of a key (and of a query)
    V  vocabulary size                 E  channels of a value
    F  width of the MLP                M  modes of the state
    L  layers                          K  tokens in a chunk
                                       N  chunks in a sequence

Einsum letters and axis comments everywhere in the package follow it. Complex arrays on hot paths are two
real planes: an axis of length 2 (real, imaginary) or, flattened with the modes, an axis of length 2M.
"""

from typing import TypeAlias

from jax import Array
from jaxtyping import Float, Int

Queries: TypeAlias = Float[Array, "B T H R"]
Keys: TypeAlias = Float[Array, "B T G R"]
Values: TypeAlias = Float[Array, "B T G E"]
Outputs: TypeAlias = Float[Array, "B T H E"]
State: TypeAlias = Float[Array, "B G 2 M width"]  # width = R + E: the features of the keys, then the values
SegmentIds: TypeAlias = Int[Array, "B T"]
