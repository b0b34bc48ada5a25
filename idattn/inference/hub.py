"""Exports on the Hugging Face hub: `hf:OWNER/NAME` in place of a folder."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from idattn.data import optional

CARD = "README.md"
_PREFIX = "hf:"


def in_hub(path: epath.PathLike) -> bool:
    """Whether a path names a repository of the hub."""
    return os.fspath(path).startswith(_PREFIX)


def pull(name: epath.PathLike) -> epath.Path:
    """The folder of the hub's cache with an export, of which it downloads what is not there.

    Args:
      name: hf:OWNER/NAME, or hf:OWNER/NAME@REVISION for a branch, tag or commit; otherwise the main branch.

    Raises:
      ConnectionError: the hub is out of reach, has no such repository or does not let you in.
      ImportError: the package huggingface_hub is missing.
      ValueError: it is no name of a repository.
    """
    name = os.fspath(name)
    repository, revision = _parse(name)
    with _talk(name) as hub:
        # An export has no folders; what else a repository holds is not needed.
        files = ["model.safetensors", "config.json", "tokenizer.*"]
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=files)
    return epath.Path(folder)


def push(folder: epath.PathLike, name: str, *, private: bool = False) -> str:
    """Upload an export as one commit to a repository of the hub, which is made where there is none.

    A model card that is there stays, since people complete it.

    Args:
      folder: of a disk, as `save_weights` writes it.
      name: hf:OWNER/NAME.
      private: of a repository that is made: only its owner sees it; False for the account's default.

    Returns:
      The address of the repository.

    Raises:
      ConnectionError: the hub is out of reach, or does not let you in.
      ImportError: the package huggingface_hub is missing.
      ValueError: it is no name of a repository.
    """
    repository, revision = _parse(name)
    if revision:
        raise ValueError(f"{name!r} must be hf:OWNER/NAME without a revision: exports go to the main branch.")
    with _talk(name) as hub:
        api = hub.HfApi(library_name="idattn")
        address = api.create_repo(repository, private=private or None, exist_ok=True)  # else the account's default
        stays = [CARD] if api.file_exists(repository, CARD) else None
        api.upload_folder(
            repo_id=repository, folder_path=os.fspath(folder), ignore_patterns=stays, commit_message="Upload an export"
        )
    return str(address)


def _parse(name: str) -> tuple[str, str | None]:
    """OWNER/NAME, and the revision where there is one."""
    match = re.fullmatch(rf"{_PREFIX}([\w.-]+/[\w.-]+)(?:@(.+))?", name)
    if not match:
        raise ValueError(f"{name!r} must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    return match[1], match[2]


@contextmanager
def _talk(name: str) -> Iterator[Any]:
    """The package of the hub, whose errors become one that says what to do."""
    hub, errors = (optional.load(module, name, "hub") for module in ("huggingface_hub", "huggingface_hub.errors"))
    try:
        yield hub
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository: {error}") from error
    except (OSError, errors.HTTPError) as error:  # answers of the hub, and where it cannot be reached
        raise ConnectionError(
            f"{name} cannot be read or written on the Hugging Face hub: {error}\nCheck the name and the network; for a "
            "private repository, and to upload, `hf auth login` or HF_TOKEN says who you are."
        ) from error
