"""Files written whole or not at all, and their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from inlay.core.errors import InlayError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the context ends without an error.

    A full disk raises InlayError; what was at `path` before is intact after any failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if system_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InlayError(f"the disk that holds {path.parent} is full: {path.name} was not written") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def system_error(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors gives it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def canonical(document: Any) -> str:
    """JSON with sorted keys and no spaces: the form that is hashed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def tensor_bytes(t: Tensor) -> bytes:
    """The raw bytes of a tensor of any type, in order."""
    t = t.detach().cpu().contiguous()
    return t.flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """One digest of names, types, shapes and bytes."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        h.update(canonical([name, str(t.dtype), list(t.shape)]).encode())
        h.update(tensor_bytes(t))
    return h.hexdigest()
