"""Captioned pictures, for training image-text models."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from inlay.archives import read

if TYPE_CHECKING:
    from PIL.Image import Image


def tuxpaint(archive: Path) -> list[tuple[Image, str]]:
    """(RGBA cut-out, English caption) of every stamp of Tux Paint, without mirrored variants, in order of their names.

    The caption is the first line of the text file beside the picture.
    """
    from PIL import Image

    files = dict(read(archive, r"tuxpaint/stamps/.*\.(png|txt)$"))
    found = []
    for name in sorted(name for name in files if name.endswith(".png")):
        text = files.get(f"{name[:-4]}.txt")
        if text is not None and not name.endswith(("_mirror.png", "_flip.png")):
            caption = text.decode("utf-8-sig", "replace").splitlines()[0].strip()
            found.append((Image.open(io.BytesIO(files[name])).convert("RGBA"), caption))
    return found
