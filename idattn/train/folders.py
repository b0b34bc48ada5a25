"""Folders of checkpoints: which one is meant, and whether its files are those that were written."""

import itertools
import logging
import math
import re
import sys
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from idattn.data.stream import sha256_of
from idattn.files import in_bucket, read_json, resolve_path, write_atomic
from idattn.inference.files import WEIGHTS
from idattn.inference.hub import in_hub, pull

MANIFEST = "manifest.json"
_LARGE = 10**9  # bytes, which take seconds
logger = logging.getLogger(__name__)


def find_checkpoint(checkpoint: epath.PathLike, which: str | int) -> epath.Path:
    """The folder of a checkpoint or export; of an export on the hub the one that it was downloaded to.

    Args:
      checkpoint: a folder, or hf:OWNER/NAME.
      which: "latest", "best" or a step, where the folder is that of a run.

    Raises:
      ConnectionError, ImportError: as `idattn.inference.pull`.
      FileNotFoundError: there is none.
      ValueError: there is no step `which`.
    """
    if in_hub(checkpoint):
        path = pull(checkpoint)
        if not (path / WEIGHTS).exists():
            raise ValueError(f"{checkpoint} has no {WEIGHTS}; give a repository that `idattn export` wrote.")
        return path
    path = absolute(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a run or of one of its checkpoints.")
    return path if (path / MANIFEST).exists() or (path / WEIGHTS).exists() else _choose(path, which)


def _choose(workdir: epath.Path, which: str | int) -> epath.Path:
    """The folder of the checkpoint `which` of a run."""
    folder = workdir / "checkpoints"
    steps = steps_in(folder)
    if not steps:
        raise FileNotFoundError(f"{workdir} is neither a checkpoint nor the folder of a run that has one.")
    if which == "latest":
        return folder / str(steps[0])
    if which == "best":
        files = {step: folder / str(step) / "metrics" / "metrics" for step in steps}
        stored = {step: read_json(file, "Choose a step.") for step, file in files.items() if file.exists()}
        losses = {step: ranking_loss(metrics) for step, metrics in stored.items()}
        if not any(map(math.isfinite, losses.values())):
            raise FileNotFoundError(f"No checkpoint in {folder} has a validation loss; use which='latest' or a step.")
        return folder / str(min(losses, key=losses.__getitem__))
    if which not in steps:
        raise ValueError(f"which={which!r} must be 'latest', 'best' or a step of {folder}: {sorted(steps)}.")
    return folder / str(which)


def steps_in(folder: epath.Path) -> list[int]:
    """The steps of the complete checkpoints, newest first; other names, as of copies and backups, do not count."""
    paths = ocp.utils.checkpoint_steps_paths(folder)
    return sorted((int(path.name) for path in paths if re.fullmatch("0|[1-9][0-9]*", path.name)), reverse=True)


def announce(folder: epath.Path) -> None:
    """Say on stderr what is about to be read, where a checkpoint or export is so large that it takes a while."""
    files = files_below(folder / "state") if (folder / "state").exists() else [folder / WEIGHTS]
    if (size := sum(file.stat().length for file in files if file.exists())) >= _LARGE:
        print(f"checking and loading {folder}, {size / 1e9:.1f} GB", file=sys.stderr, flush=True)


def damage_of(folder: epath.Path, item: str = "") -> str:
    """What is wrong with the files of a checkpoint, or of one item of it; empty if nothing is.

    Raises:
      OSError: a file is there and cannot be read, which says nothing of the checkpoint.
    """
    try:
        digests = read_json(folder / MANIFEST, "")
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except ValueError as error:
        return str(error).removesuffix(". ")
    for name, digest in digests.items():
        if not name.startswith(item):
            continue
        try:
            found = sha256_of(folder / name)
        except FileNotFoundError:
            return f"{folder / name} is missing"
        if found != digest:
            return f"{folder / name} does not match its checksum in {MANIFEST}"
    return ""


def move_damaged(folder: epath.Path) -> str:
    """Move damaged checkpoints to `broken` next to `folder`; if all are, move none and return what is wrong."""
    broken, any_valid = {}, False
    for step in steps_in(folder):
        # Reading a checkpoint takes time: those older than the newest valid one wait until they are needed, but for
        # the losses, which Orbax reads at once.
        if not any_valid:
            announce(folder / str(step))
        if damage := damage_of(folder / str(step), "metrics/" if any_valid else ""):
            broken[step] = damage
        else:
            any_valid = True
    if not any_valid:
        return "; ".join(broken.values())
    for step, damage in broken.items():
        count = itertools.count(1)
        target = folder.parent / "broken" / str(step)
        while target.exists():
            target = target.with_name(f"{step}-{next(count)}")
        write_atomic(target.with_name(f"{target.name}.txt"), damage)  # also makes the folder of both
        (folder / str(step)).rename(target)
        logger.warning("Checkpoint %d is not used and moved to %s: %s.", step, target, damage)
    return ""


def ranking_loss(metrics: dict[str, float | None]) -> float:
    """The loss that ranks a checkpoint: infinite where older versions stored NaN, or null for it."""
    loss = metrics.get("val_loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files of a folder and of the folders in it."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that a user names, which stays the same when the process changes its folder."""
    path = resolve_path(path)
    return path if in_bucket(path) else path.absolute()
