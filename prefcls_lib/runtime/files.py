"""Files: whatever goes wrong is one message for the user (`UserError`), and what is written is whole or not there."""

import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RESUME = "What was saved is kept; run the same command to resume."  # ends the message where a run was stopped


class UserError(Exception):
    """Something the user can put right: what, where, what to do next. A command prints it and exits with code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Foreign text with its control characters and lone surrogates escaped, which no terminal or file should get."""
    control = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"  # all but the line break
    return re.sub(control, lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: object) -> str:
    """A value as messages show it: its `repr`, of 80 characters at most."""
    text = repr(value[:80]) if isinstance(value, (str, bytes)) else reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reason(error: Exception) -> str:
    """What a library says went wrong, in one line."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())[:200]
    return text if text and isinstance(error, OSError) else f"{type(error).__name__}: {text}"


@contextmanager
def reading(path: str | Path, remedy: str = "Download the file again.", missing: str = "Check the path.") -> Iterator:
    """Turn whatever goes wrong in the body, which reads `path`, into one message: damaged files raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not Path(path).exists():  # else something in a folder is missing
            raise UserError(f"{path}: no such file. {missing}") from None
        raise UserError(f"{path}: cannot be read ({reason(error)}). {remedy}") from error


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` for the body to write, then renamed over `path`: an older file or folder stays
    until then, a failure leaves nothing half-written, and what a killed process left of this file is removed."""
    path = Path(path)
    temporary = path.parent / f".tmp-{path.name}"  # with_name would raise for / and .
    older = path.parent / f".{path.name}.old"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path.is_file() or path.is_dir()):  # such as /dev/null, which root can replace
            raise OSError("it is neither a file nor a folder")
        _remove(temporary)
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(older, ignore_errors=True)
            path.replace(older)  # killed after this line, the older folder is still there under that name
        temporary.replace(path)
        shutil.rmtree(older, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:  # on a full disk each library raises its own
        remedy = "Free some space or name another place with --out; what was there before is untouched."
        raise UserError(f"{path}: cannot be written ({reason(error)}). {remedy}") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # of a file it does nothing
    with suppress(OSError, ValueError):  # ValueError: a name that no file can have
        path.unlink()


def lock_folder(folder: Path) -> int:
    """Hold a folder for this process until it ends, or until `os.close` of what is returned."""
    import fcntl  # not on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)}). Name another place with --out.") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise UserError(f"{folder}: in use by another process. Wait for its end, or name another --out.") from None
    except OSError:  # a file system without locks
        pass
    return held


def refuse_overwriting(out: str | Path, *inputs: str | Path) -> None:
    """Refuse an output that is one of the files that are read, or a file inside a folder that is read."""
    place, *read = (Path(os.path.realpath(path)) for path in (out, *inputs))  # Path.resolve raises for a loop of links
    for path in read:
        if place == path or (place.exists() and path in place.parents):
            raise UserError(f"--out {out}: would overwrite what is read from {path}. Name another place.")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON, whole or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON object that this library wrote."""
    with reading(path, "Copy the run folder again.", "Is this the folder of a finished run?"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with reading(path), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
