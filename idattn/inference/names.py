"""Names of the arrays in checkpoints and exports: those of older versions, and where two sets differ."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

# Components of names that older versions wrote, and what the model calls them today.
_RENAMED = {
    "first": "key",
    "second": "value",
    "first_conv": "key_conv",
    "second_conv": "value_conv",
    "first_norm": "key_norm",
    "second_norm": "value_norm",
}


def leaf_name(path: Any) -> str:
    """The dotted name of a path of `jax.tree.flatten_with_path`, such as groups.block_0.mlp.up.weight."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted names."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def current_names(stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Today's name of each stored array.

    Args:
      stored: names in a file.
      wanted: names in the model or state that reads it.

    Returns:
      stored name -> the same name, or the one that replaced it if only that is wanted.
    """
    wanted = frozenset(wanted)

    def current(name: str) -> str:
        renamed = ".".join(_RENAMED.get(part, part) for part in name.split("."))
        return renamed if name not in wanted and renamed in wanted else name

    return {name: current(name) for name in stored}


def differences(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Where two sets of arrays differ, "NAME: DESCRIPTION stored, DESCRIPTION wanted" each.

    Args:
      stored: description (dtype, shape) of each stored array by its name.
      wanted: the same of the model or state that reads them.
    """
    return [
        f"{name}: {stored.get(name, 'nothing')} stored, {wanted.get(name, 'nothing')} wanted"
        for name in sorted({**stored, **wanted})
        if stored.get(name) != wanted.get(name)
    ]
