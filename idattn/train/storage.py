"""Local folders for libraries that cannot write to a bucket."""

import shutil
import tempfile
from pathlib import Path

from etils import epath

from idattn.files import in_bucket


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
