"""AdamW or Muon with the SSM group, warm-up and cosine (appendix A.2 of the paper)."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import optax
from flax import nnx
from optax import contrib

from idattn.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int, *, ssm: bool = False) -> optax.Schedule:
    """The learning rate of update 0, 1, ..., steps - 1: linear warm-up, then cosine to final_lr at the last update.

    Args:
      config: the recipe.
      steps: updates of the run.
      ssm: of the SSM group, whose peak is capped.
    """
    peak = min(config.peak_lr, config.ssm_lr_cap) if ssm else config.peak_lr
    warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
    decay = optax.cosine_decay_schedule(
        peak, max(steps - config.warmup_steps, 1), alpha=min(config.final_lr, peak) / peak
    )
    schedule = optax.join_schedules([warmup, decay], [config.warmup_steps])
    return lambda count: schedule(count + 1)  # the first update is not lost on a rate of 0


def group_of(variable: nnx.Variable) -> str:
    """The optimiser's group of a parameter, as of `idattn.nn.param`."""
    return variable.get_metadata().get("group", "other")


def make_optimizer(config: OptimConfig, steps: int, model: nnx.Module) -> optax.GradientTransformation:
    """AdamW or Muon on nested dicts of the model's parameters, whose metadata say which group each belongs to.

    Muon treats the layers' matrices; the embedding and the head, whose rows are tokens, and all that is no matrix have
    Adam. Both move an entry by about as much, so that they share a learning rate.

    Args:
      config: the recipe.
      steps: updates of the run.
      model: a module, abstract or real.
    """

    def tree_of(function: Callable[[nnx.Variable], Any]) -> dict[Any, Any]:
        variables = nnx.to_flat_state(nnx.state(model, nnx.Param))
        nested: dict[Any, Any] = {}
        for path, variable in variables:
            node = nested
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = function(variable)
        return nested

    rule = adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        rules: dict[Hashable, optax.GradientTransformation] = {"muon": _scale_by_muon(config.momentum), "adam": adam}
        treats = tree_of(
            lambda v: "muon" if group_of(v) == "matrix" and "V" not in v.get_metadata()["dims"] else "adam"
        )
        rule = optax.partition(rules, treats)
    rates: dict[Hashable, optax.GradientTransformation] = {
        "ssm": optax.scale_by_learning_rate(learning_rate(config, steps, ssm=True)),
        "other": optax.scale_by_learning_rate(learning_rate(config, steps)),
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        rule,
        optax.add_decayed_weights(config.weight_decay, tree_of(lambda v: group_of(v) == "matrix")),
        optax.partition(rates, tree_of(lambda v: "ssm" if group_of(v) == "ssm" else "other")),
    )


def _scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) for stacks of matrices, its updates scaled to the size of Adam's (arXiv 2502.16982)."""

    def axes(matrices: Any) -> Any:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), matrices)

    def like_adam(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)

    return optax.chain(contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes), optax.stateless(like_adam))
