"""Loss on held-out text."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from idattn.config import Config
from idattn.data.batch import Batch
from idattn.loss import cross_entropy


def batch_loss(graphdef: nnx.GraphDef, params: Any, batch: Batch, config: Config) -> tuple[jax.Array, jax.Array]:
    """The summed loss of a batch in nats, and the number of targets that count.

    Args:
      graphdef: of a LanguageModel.
      params: its parameters, as nested dicts of arrays.
      batch: as `idattn.data.batch.ARRAYS` describes it, each array (B, T).
      config: of the run.
    """
    model = nnx.merge(graphdef, params)
    # Without resets the only segment is padding at the end, which the loss masks and causality hides.
    segment_ids = batch["segment_ids"] if config.data.documents == "reset" else None
    hidden, _ = model.hidden(batch["inputs"], segment_ids=segment_ids)
    with jax.named_scope("loss"):
        return cross_entropy(
            hidden, model.head.weight[...], batch["targets"], batch["loss_mask"], chunk=config.compute.loss_chunk
        )


def mean_loss(
    loss: Callable[[Any, Batch], tuple[jax.Array, jax.Array]], params: Any, batches: Iterable[Batch]
) -> float:
    """The mean loss in nats per target over all batches.

    Args:
      loss: (params, batch) -> sum and count, such as a compiled `batch_loss`.
      params: of the model.
      batches: at least one with a target that counts.

    Raises:
      ValueError: no target counts.
    """
    sums = np.zeros(2)
    for batch in batches:
        sums += np.asarray(jax.device_get(loss(params, batch)), np.float64)
    if sums[1] == 0:
        raise ValueError("There is no target to evaluate on: every position of the batches is masked.")
    return float(sums[0] / sums[1])


def token_losses(graphdef: nnx.GraphDef, params: Any, batch: Batch, config: Config) -> jax.Array:
    """(B, T) the loss of each target in nats, 0 where it does not count; arguments as for `batch_loss`."""
    mask = batch["loss_mask"]

    def total(mask):
        return batch_loss(graphdef, params, dict(batch) | {"loss_mask": mask}, config)[0]

    return jax.grad(total)(mask) * mask  # the sum is linear in the mask


def document_losses(losses: Callable[[Batch], jax.Array], batches: Iterable[Batch], bos_id: int) -> np.ndarray:
    """The loss of every document that batches hold.

    Args:
      losses: batch -> (B, T), such as a compiled `token_losses`.
      batches: consecutive windows of a stream of documents, from its beginning; padding has segment id -1.
      bos_id: the token that begins every document.

    Returns:
      (documents, 2) float64: the sum in nats, and the number of targets that count.
    """
    last, sums = -1, np.zeros((0, 2))
    for batch in batches:
        real = np.asarray(batch["segment_ids"]) >= 0
        numbers = last + np.cumsum(np.asarray(batch["inputs"])[real] == bos_id)
        last = numbers[-1]
        sums = np.pad(sums, ((0, last + 1 - len(sums)), (0, 0)))
        for column, values in enumerate((losses(batch), batch["loss_mask"])):
            np.add.at(sums[:, column], numbers, np.asarray(jax.device_get(values), np.float64)[real])
    return sums
