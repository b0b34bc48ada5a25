"""Folders of runs: on a disk, or in a bucket of Google Cloud Storage, where a file is written whole or not at all."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from etils import epath
from etils.epath.backend import fsspec_backend

from idattn.files import write_atomic as write_whole

__all__ = ["LocalFolder", "in_bucket", "run_folder", "write_whole"]


def run_folder(path: epath.PathLike) -> epath.Path:
    """The path of the folder of a run or checkpoint, for use on disks and in buckets alike; `~` is the home folder.

    Args:
      path: of a disk, or gs://BUCKET/FOLDER.

    Raises:
      ImportError: the path is in a bucket and the package gcsfs is missing.
      ValueError: the path is of another kind of storage.
    """
    scheme = re.match(r"(\w{2,}):/", os.fspath(path))
    if not scheme:
        return epath.Path(path).expanduser()
    if not re.match("gs://[^/]+/.", os.fspath(path)):
        raise ValueError(f"{os.fspath(path)!r} must be a folder of a disk, or the string gs://BUCKET/FOLDER.")
    try:
        import gcsfs  # noqa: F401  optional: runs on disks do without it
    except ImportError as error:
        raise ImportError(f"{path} needs the package gcsfs: pip install idattn[gcs].") from error
    # Else what TensorStore and other processes write would be missing in the listings of this one.
    listings = fsspec_backend.fs(path).dircache
    listings.use_listings_cache = False
    listings.clear()
    return epath.Path(path)


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path that `run_folder` took is in a bucket."""
    return os.fspath(path).startswith("gs://")


class LocalFolder:
    """A local `path` for libraries that write to disks alone or append: `folder` itself, or one uploaded to its bucket.

    Args:
      folder: folder of the run, or one in it.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._uploads = folder, in_bucket(folder)
        self.path = Path(tempfile.mkdtemp(prefix="idattn-") if self._uploads else folder)

    def upload(self) -> None:
        """Copy all files to the bucket, if it is one; each appears there whole, in place of the one before."""
        for file in self.path.rglob("*") if self._uploads else ():
            if file.is_file():
                (self._folder / file.relative_to(self.path)).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Upload, and remove what was local for that alone."""
        self.upload()
        if self._uploads:
            shutil.rmtree(self.path)
