"""What a batch is: its arrays, their dtypes and their padding."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Batch = Mapping[str, Any]  # name of ARRAYS -> array (B, T), or (T,) of one window


class ArraySpec(NamedTuple):
    """Dtype of an array of a batch, and its value where there is no token."""

    dtype: np.dtype
    padding: int


ARRAYS: Mapping[str, ArraySpec] = {
    "inputs": ArraySpec(np.dtype(np.int32), 0),  # tokens
    "targets": ArraySpec(np.dtype(np.int32), 0),  # the token after each input
    "segment_ids": ArraySpec(np.dtype(np.int32), -1),  # the document of each input, counted from 0 in its window
    "loss_mask": ArraySpec(np.dtype(np.float32), 0),  # 1 where the target counts
}
