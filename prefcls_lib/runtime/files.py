"""Files that are written atomically, whole or not at all, and the one exception whose message is for users."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message says what, where, and what to do next.

    The command line prints it without a traceback and exits with code 2.
    """


def write_whole(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then rename it over `path`.

    Until the rename an older good file (or folder) stays as it was; after a failure nothing half-written
    is left behind.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(backup_of(path), ignore_errors=True)
            path.replace(backup_of(path))  # killed after this line, the older folder is still there under that name
        temporary.replace(path)
        shutil.rmtree(backup_of(path), ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Free some space or name another place with --out; what was there before is untouched."
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # mostly: it is not there; below a regular file that is another error
                temporary.unlink()


def backup_of(path: Path) -> Path:
    """Where `write_whole` keeps an older folder for the moment between two renames."""
    return path.with_name(f".{path.name}.old")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path` as readable JSON, atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON file that this library wrote.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Is this the folder of a finished run?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Copy the run folder again.") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
