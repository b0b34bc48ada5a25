"""The folder of a run: one run at a time, and local files for libraries that cannot write to a bucket."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils

from idattn.files import in_bucket, lock_file


@contextmanager
def exclusive(workdir: epath.Path) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the block, or with the process.

    The first process locks `workdir/lock` for all processes of the run. A bucket has no locks: there nothing is done,
    and two runs in one folder of a bucket would mix their files.

    Args:
      workdir: folder of the run; made if it does not exist.

    Raises:
      OSError: the folder cannot be written.
      ValueError: another run is there; its host, its process and when it started are named.
    """
    with ExitStack() as stack:
        holder = ""
        if jax.process_index() == 0 and not in_bucket(workdir):
            with writing(workdir):
                if stack.enter_context(lock_file(workdir / "lock")) is None:
                    holder = (workdir / "lock").read_text() or "a process that has just started"
        if multihost_utils.broadcast_one_to_all(bool(holder)):
            raise ValueError(
                f"{workdir} is in use by another run: {holder or 'see process 0'}. Wait until it ends, stop it, or "
                "name another workdir."
            )
        yield


@contextmanager
def writing(workdir: epath.PathLike) -> Iterator[None]:
    """Say in an OSError that the folder of the run cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"workdir={str(workdir)!r} cannot be written ({error}); name a folder that can.") from error


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
