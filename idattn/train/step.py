"""The training state and one optimiser step on it, as pure functions of nested dicts of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from idattn.config import Config
from idattn.evals.perplexity import Batch, batch_loss
from idattn.nn import LanguageModel
from idattn.train.optim import learning_rate, make_optimizer

State = dict[str, Any]  # params, opt_state, finite


class Trainer:
    """The compiled functions of a run; the model's structure is taken apart once, here.

    Attributes:
      init: () -> state at step 0: `params`, `opt_state` and `finite`, whether every step so far was.
      step: (state, batch, step number from 0) -> state, metrics; the old state is given up.
      loss: (params, batch) -> summed loss in nats, number of targets.
    """

    def __init__(self, config: Config):
        def make_model():
            return LanguageModel(config.model, config.compute, rngs=nnx.Rngs(config.seed))

        abstract = nnx.eval_shape(make_model)
        self.config = config
        self.graphdef = nnx.graphdef(abstract)
        self._optimizer = make_optimizer(config.optim, config.train.steps, abstract)
        self._learning_rate = learning_rate(config.optim, config.train.steps)

        def init() -> State:
            params = nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
            # Weakly typed arrays, as of jnp.full(shape, 0.0), would compile the step a second time.
            params = jax.tree.map(lambda x: x.astype(x.dtype), params)
            return {"params": params, "opt_state": self._optimizer.init(params), "finite": jnp.array(True)}

        self.init: Callable[[], State] = jax.jit(init)
        self.step: Callable[[State, Batch, int], tuple[State, dict[str, jax.Array]]] = jax.jit(
            self._step, donate_argnums=0
        )
        self.loss = jax.jit(lambda params, batch: batch_loss(self.graphdef, params, batch, config))

    def abstract_state(self) -> State:
        """Shapes, dtypes and sharding of the state."""
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(self.init)
        )

    def _step(self, state: State, batch: Batch, step: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        loss, tokens, grads = self._gradients(state["params"], batch)
        updates, opt_state = self._optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        grad_norm = optax.tree.norm(grads)
        # After a loss or gradient that is not finite the state stays what it was, until the loop looks at it.
        finite = state["finite"] & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = {"params": params, "opt_state": opt_state}
        old = {name: state[name] for name in new}
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self._learning_rate(step),
            "tokens": tokens,
            "finite": finite,
        }
        return state | {"finite": finite}, metrics

    def _gradients(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
        """Mean loss in nats per target, number of targets, and gradients, over the parts of the batch in turn."""
        parts = self.config.train.accumulation
        batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        count = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)

        def part_loss(params, part):
            return batch_loss(self.graphdef, params, part, self.config)[0] / count

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(part_loss)(params, part)), None

        zero = jax.tree.map(jnp.zeros_like, (count, params))
        (loss, grads), _ = jax.lax.scan(add, zero, batch)
        return loss, count, grads
