"""Checkpoints of a run: state, data position and config, committed together and verified before use.

`workdir/checkpoints/<step>/` holds the Orbax items `state`, `data`, `config` and, after an evaluation, `metrics`.
TensorStore checks its index but not the arrays it points to, so a flipped bit would load as a wrong number; every
checkpoint therefore carries `manifest.json`, the SHA-256 of each file of its items, written before Orbax commits.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from idattn.config import Config, from_config_dict
from idattn.data.stream import sha256_of
from idattn.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from idattn.files import read_json, write_atomic
from idattn.inference.files import WEIGHTS, abstract_params, load_weights
from idattn.inference.names import current_names, differences, leaf_name, named_leaves
from idattn.train.folders import (
    MANIFEST,
    absolute,
    announce,
    damage_of,
    files_below,
    find_checkpoint,
    move_damaged,
    ranking_loss,
    steps_in,
)
from idattn.train.storage import writing

TOKENIZER = "tokenizer"


class Checkpoints:
    """The checkpoints of a run, saved in the background; a context manager that waits for them at the end.

    Opening moves checkpoints with damaged files to `workdir/broken` and warns, unless no valid one would be left.

    Args:
      workdir: folder of the run.
      keep_latest: number of newest checkpoints to keep.
      keep_best: number of checkpoints to keep for their low validation loss, in addition to the newest.
      tokenizer: of the run, whose files become part of every checkpoint.

    Raises:
      RuntimeError: there are checkpoints but none is valid.
    """

    def __init__(self, workdir: epath.PathLike, keep_latest: int, keep_best: int, tokenizer: Tokenizer | None = None):
        self._tokenizer = tokenizer
        self._folder = absolute(workdir) / "checkpoints"
        broken = move_damaged(self._folder) if jax.process_index() == 0 else ""
        if multihost_utils.broadcast_one_to_all(bool(broken)):
            raise RuntimeError(
                f"No checkpoint in {self._folder} is valid: {broken or 'see process 0'}. Repair one, or move them away "
                "to start anew."
            )
        self._saving = -1
        best = BestN(get_metric_fn=ranking_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy([LatestN(keep_latest), best]),
                best_fn=ranking_loss,
                best_mode="min",
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._finish()
        finally:
            self._manager.close()

    def save(self, step: int, state: Any, data_iterator: Any, config: Config, val_loss: float | None = None) -> None:
        """Start saving a checkpoint; `state` may be changed or donated after the return.

        Args:
          step: optimiser steps done.
          state: pytree of jax arrays.
          data_iterator: grain iterator, positioned at the next batch.
          config: of the run.
          val_loss: nats per token, if there was an evaluation at this step; a value that is not finite never ranks.

        Raises:
          ValueError: there is a checkpoint of this step.
          RuntimeError: the previous one could not be written.
        """
        self._finish()  # _write_manifest may still need the previous step
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data_iterator.get_state()),  # the same on all processes, for any number of them
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
            metrics={"val_loss": float(val_loss)} if val_loss is not None and math.isfinite(val_loss) else None,
            force=True,  # else Orbax skips steps below the latest without a word
        )

    def restore_latest(self, abstract_state: Any, data_iterator: Any) -> tuple[int, Any] | None:
        """Restore the newest checkpoint and set the data iterator to its position.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings.
          data_iterator: grain iterator of the same pipeline, changed in place.

        Returns:
          Step and state, or None if the run has no checkpoint.

        Raises:
          ValueError: names, shapes or dtypes of the stored state differ from `abstract_state`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        folder = self._folder / str(step)
        stored, wanted = _stored_tree(folder), named_leaves(abstract_state)
        names = current_names(named_leaves(stored), wanted)
        _check_structure(folder, {names[name]: leaf for name, leaf in named_leaves(stored).items()}, wanted)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(
                    jax.tree.map_with_path(lambda path, _: wanted[names[leaf_name(path)]], stored)
                ),
                data=ocp.args.JsonRestore(),
            ),
        )
        data_iterator.set_state(restored["data"])
        values = {names[name]: value for name, value in named_leaves(restored["state"]).items()}
        return step, jax.tree.map_with_path(lambda path, _: values[leaf_name(path)], abstract_state)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, also one that is still being written; None if there is none."""
        return self._manager.latest_step()

    def _finish(self) -> None:
        """Wait for the save that is under way."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as many kinds as there are file systems
            last = max(steps_in(self._folder), default=0)
            raise RuntimeError(
                f"The checkpoint of step {self._saving} could not be written to {self._folder}: {error}. Make room, or "
                f"let it be written, and start the run again: it resumes from step {last}."
            ) from error

    def _write_manifest(self) -> None:
        # Orbax calls this on the first process, when all items are complete but the folder is not: it has its temporary
        # name, or in a bucket no commit_success.txt.
        name = re.compile(rf"{self._saving}({re.escape(ocp.utils.TMP_DIR_SUFFIX)}.*)?")
        (folder,) = (path for path in self._folder.iterdir() if name.fullmatch(path.name))
        if self._tokenizer is not None:
            save_tokenizer(self._tokenizer, folder / TOKENIZER)
        files = (file for item in folder.iterdir() if item.is_dir() for file in files_below(item))
        digests = {str(file.relative_to(folder)): sha256_of(file) for file in files}
        write_atomic(folder / MANIFEST, json.dumps(digests, indent=0, sort_keys=True))


def check_same_run(workdir: epath.PathLike, config: Config, data: Mapping[str, str] | None = None) -> None:
    """Write a new run's `config.json` and `data.json` to `workdir`, or compare with those that are there.

    Args:
      workdir: folder of the run.
      config: config of this start.
      data: digests of its data by name, as of `idattn.data.digests`.

    Raises:
      OSError: the folder cannot be written.
      ValueError: a setting of `Config.identity` or a digest differs from the stored one.
    """
    file, data_file = (absolute(workdir) / name for name in ("config.json", "data.json"))
    if not file.exists():
        if jax.process_index() == 0:
            with writing(workdir):
                if data:
                    write_atomic(data_file, json.dumps(dict(data), indent=2))
                write_atomic(file, json.dumps(dataclasses.asdict(config), indent=2))
        return
    remedy = "Start the run in another workdir, or delete the file if this is the run's config."
    stored = from_config_dict(read_json(file, remedy))
    differing = config.differences(stored)
    if data and data_file.exists():  # older versions wrote none
        digests = read_json(data_file, remedy)
        paths = {"tokenizer": "tokenizer", "train": "source", "validation": "source"}
        differing += [
            f"the content of data.{paths[name]} ({name}): {getattr(stored.data, paths[name])!r} there, "
            f"{getattr(config.data, paths[name])!r} now"
            for name in paths
            if digests.get(name) != data[name]
        ]
    if differing:
        raise ValueError(
            f"{file} is of another run ({'; '.join(differing)}). Use another workdir, or --init_from to start a new "
            "run from the weights only."
        )


def load_params(checkpoint: epath.PathLike, which: str | int = "latest") -> tuple[Config, Any, int]:
    """Load the parameters of a checkpoint onto the default device, without the optimiser state.

    Args:
      checkpoint: folder of a run, of one checkpoint (`workdir/checkpoints/<step>`), or of exported weights; or
        hf:OWNER/NAME, exported weights on the Hugging Face hub.
      which: "latest", "best" (lowest validation loss) or a step; ignored for the folder of one checkpoint.

    Returns:
      Config, parameters as nested dicts with string keys, and step.

    Raises:
      ConnectionError, ImportError: as `idattn.inference.pull`.
      FileNotFoundError: the path does not exist, holds no checkpoint, or none with a validation loss for "best".
      ValueError: the checkpoint is damaged, or there is no step `which`.
    """
    folder = find_checkpoint(checkpoint, which)
    if jax.process_index() == 0:
        announce(folder)
    if (folder / WEIGHTS).exists():
        return load_weights(folder)
    if damage := damage_of(folder):
        raise ValueError(f"The checkpoint is damaged: {damage}. Choose another step.")
    config = from_config_dict(read_json(folder / "config" / "metadata", "Choose another step."))
    abstract = {"params": _stored_tree(folder)["params"]}
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract),
                partial_restore=True,
            ),
        )
    params = {name: jnp.asarray(value) for name, value in named_leaves(restored["params"]).items()}
    names = current_names(params, named_leaves(abstract_params(config)))
    return config, unflatten_dict({names[name]: x for name, x in params.items()}, sep="."), int(folder.name)


def checkpoint_tokenizer(
    checkpoint: epath.PathLike, config: Config, which: str | int = "latest", name: str = ""
) -> Tokenizer:
    """The tokenizer that a checkpoint or an export contains, not the one that is now at the path it was trained with.

    Args:
      checkpoint, which: as in `load_params`.
      config: as returned by `load_params`; an older checkpoint without a tokenizer uses its `data.tokenizer`.
      name: another copy, as `load_tokenizer` takes it; empty for the checkpoint's.

    Raises:
      FileNotFoundError: there is no such checkpoint, or an older one's tokenizer is not where its config says.
      ValueError: `name` is another tokenizer than the checkpoint's.
    """
    folder = find_checkpoint(checkpoint, which)
    folder = folder if (folder / WEIGHTS).exists() else folder / TOKENIZER
    if not folder.exists() or not any(path.stem == "tokenizer" for path in folder.iterdir()):
        return load_tokenizer(name or config.data.tokenizer)
    stored = load_tokenizer(folder)
    if not name:
        return stored
    given = load_tokenizer(name)
    if given.fingerprint != stored.fingerprint:
        raise ValueError(
            f"tokenizer={name!r} ({given.fingerprint[:12]}) is another than that of {checkpoint} "
            f"({stored.fingerprint[:12]}). Leave it out to use the checkpoint's, which is in {folder}."
        )
    return given


def checkpoint_loss(checkpoint: epath.PathLike, which: str | int = "latest") -> float | None:
    """The validation loss of a checkpoint in nats per token; None where there was no evaluation, and for an export.

    Args:
      checkpoint, which: as in `load_params`.
    """
    file = find_checkpoint(checkpoint, which) / "metrics" / "metrics"
    loss = ranking_loss(read_json(file, "Choose another step.")) if file.exists() else math.inf
    return loss if math.isfinite(loss) else None


def save_aside(workdir: epath.PathLike, name: str, state: Any) -> None:
    """Save a state to `workdir/name` for inspection and wait for it; an earlier one of this name is replaced.

    Args:
      workdir: folder of the run.
      name: of the new folder.
      state: pytree of jax arrays.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(workdir) / name, state, force=True)


def _stored_tree(folder: epath.Path) -> Any:
    return ocp.StandardCheckpointHandler().metadata(folder / "state").tree


def _check_structure(folder: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # Orbax casts to another dtype without a word.
    described = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()} for leaves in (stored, wanted)
    )
    if differing := differences(*described):
        raise ValueError(
            f"{folder} holds a state of another structure in {len(differing)} arrays ({'; '.join(differing[:5])}). "
            "Resume with the model and optimiser that it was saved with."
        )
