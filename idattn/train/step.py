"""The training state and one optimiser step on it, as pure functions of nested dicts of arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from idattn.config import Config
from idattn.data.batch import ARRAYS, Batch
from idattn.evals.perplexity import batch_loss
from idattn.nn import LanguageModel, model_specs
from idattn.sharding import check_divides, constrain, make_mesh, on_mesh, spec
from idattn.train.optim import learning_rate, make_optimizer

State = dict[str, Any]  # step, params, opt_state, not_finite


class Trainer:
    """The compiled functions of a run.

    Attributes:
      mesh: that everything runs on.

    Args:
      config: of the run.
      mesh: None for one over all devices, as `config.mesh` says.

    Raises:
      ValueError: the mesh does not fit the devices, or does not divide what it splits.
    """

    def __init__(self, config: Config, mesh: Mesh | None = None):
        abstract = LanguageModel.abstract(config.model, config.compute)
        self.config = config
        self.mesh = make_mesh(config.mesh) if mesh is None else mesh
        check_divides(config, self.mesh)
        self.graphdef = nnx.graphdef(abstract)
        self._optimizer = make_optimizer(config.optim, config.train.steps, abstract)
        self._learning_rate = learning_rate(config.optim, config.train.steps)

        def init() -> State:
            model = LanguageModel(config.model, config.compute, rngs=nnx.Rngs(config.seed))
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            # Weakly typed arrays, as of jnp.full(shape, 0.0), would compile the step a second time.
            params = jax.tree.map(lambda x: x.astype(x.dtype), params)
            counts = {"step": jnp.int32(0), "not_finite": jnp.int32(0)}
            return counts | {"params": params, "opt_state": self._optimizer.init(params)}

        self._shapes = jax.eval_shape(init)
        self._shardings = on_mesh(self.mesh, self._specs(model_specs(abstract)))
        self._init = jax.jit(init, out_shardings=self._shardings)
        self._compiled_step = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, None))
        self._compiled_loss = jax.jit(self._loss)

    def init(self) -> State:
        """The state before the first step: `step`, `not_finite` (how many steps were not), `params`, `opt_state`."""
        with jax.set_mesh(self.mesh):
            return self._init()

    def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """The state after a step on a batch, and the step's metrics; the given state's memory is reused."""
        with jax.set_mesh(self.mesh):
            return self._compiled_step(state, batch)

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The summed loss of a batch in nats, and its number of targets."""
        with jax.set_mesh(self.mesh):
            return self._compiled_loss(params, batch)

    def trace_step(self) -> jax.stages.Traced:
        """The step for a batch as the config describes it, to be lowered and compiled without running anything."""
        shape = (self.config.train.batch_size, self.config.data.seq_len)
        sharding = NamedSharding(self.mesh, spec("B", "T"))
        batch = {name: jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding) for name, array in ARRAYS.items()}
        with jax.set_mesh(self.mesh):
            return self._compiled_step.trace(self.abstract_state(), batch)

    def abstract_state(self) -> State:
        """Shapes, dtypes and sharding of the state."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self._shapes, self._shardings
        )

    def _specs(self, params: Any) -> Any:
        """The specs of the state: what the optimiser stores of a parameter is split as the parameter."""
        whole = PartitionSpec()
        opt_state = optax.tree.map_params(
            self._optimizer,
            lambda x, s: x if isinstance(x, optax.MaskedNode) else s,  # of a parameter that the rule does not treat
            self._shapes["opt_state"],
            params,
            transform_non_params=lambda _: whole,
            is_leaf=lambda x: isinstance(x, optax.MaskedNode),
        )
        return {"step": whole, "not_finite": whole, "params": params, "opt_state": opt_state}

    def _step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        loss, targets, grads = self._gradients(state["params"], batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = self._optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        grad_norm = optax.tree.norm(grads)
        # A loss or gradient that is not finite changes nothing in the state; after more of them than the run skips, no
        # later step does either, until the loop sees it and stops.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        not_finite = state["not_finite"] + ~finite
        continues = not_finite <= self.config.train.skip_not_finite
        good = finite & continues
        new = {"params": params, "opt_state": opt_state}
        old = {name: state[name] for name in new}
        with jax.named_scope("optimizer"):  # one fusion with the update
            new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": self._learning_rate(state["step"]),
            "targets": targets,
            "not_finite": not_finite,
        }
        return new | {"step": state["step"] + continues, "not_finite": not_finite}, metrics

    def _gradients(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
        """Mean loss in nats per target, number of targets, and gradients, over the parts of the batch in turn."""
        count = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)

        def part_loss(params, part):
            return batch_loss(self.graphdef, params, part, self.config)[0] / count

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(part_loss)(params, part)), None

        dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(jnp.float32, self.config.compute.dtype))
        zero = (jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), _ = jax.lax.scan(add, zero, self._parts(batch))
        return loss, count, grads

    def _loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The summed loss and the number of targets, over the parts of the batch in turn."""
        sums = jax.lax.map(lambda part: batch_loss(self.graphdef, params, part, self.config), self._parts(batch))
        return jax.tree.map(jnp.sum, sums)

    def _parts(self, batch: Batch) -> Batch:
        """A batch in `train.accumulation` parts: each array (parts, B / parts, T)."""
        parts = self.config.train.accumulation
        return jax.tree.map(lambda x: constrain(x.reshape(parts, -1, *x.shape[1:]), None, "B", "T"), batch)
