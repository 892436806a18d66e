"""Files whole or not at all, in a folder that is tried before the work and not after it."""

import os
import shutil
import tempfile
from pathlib import Path


def check_folder(folder: Path, need: int) -> None:
    """Makes the folder; raises OSError if it cannot be written to or has less than `need` bytes left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out: expected a folder that can be written to, got {folder}: {error}") from error
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f"--out: expected {need / 1e6:.0f} MB of free disk at {folder}, got {free / 1e6:.0f}")


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Fills a temporary file beside `path`, then moves it there; an error leaves what was there."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_somewhere(path: Path, content: bytes | memoryview) -> None:
    """`write_whole`; if the disk is full or gone, into a temporary folder or the home, which it then says.

    Raises:
        OSError: `path` was not written; the message says where the content is instead, if anywhere.
    """
    try:
        return write_whole(path, content)
    except OSError as error:
        first = error
    for folder in (Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        try:
            other = Path(tempfile.mkdtemp(prefix="l0kernels-", dir=folder)) / path.name
            write_whole(other, content)
        except OSError:
            continue
        raise OSError(f"{first}; it is in {other} instead")
    raise OSError(f"{first}; nor is there room in the temporary, the home or the current folder")
