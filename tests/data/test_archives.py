"""Fetching: from a registry the test sets up itself, and every way it can go wrong."""

import hashlib
import io
import json
import multiprocessing
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from inlay import archives
from inlay.archives import Archive, ArchiveError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "archives"


def wheel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("tiny_wheel/data.txt", "seven")
        archive.writestr("tiny_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        archive.writestr("tiny_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_wheel-1.0.dist-info/RECORD", "")
    return out.getvalue()


def tarball(root: str, files: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def entry(registry: str, package: str, version: str, file: str, content: bytes) -> Archive:
    return Archive(registry, package, version, file, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def pip_index(tmp_path, monkeypatch):
    """A folder that pip is configured to take packages from, in place of any network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_wheel_is_fetched_once(pip_index, cache, capfd):
    content = wheel()
    (pip_index / "tiny_wheel-1.0-py3-none-any.whl").write_bytes(content)
    tiny = entry("pypi", "tiny-wheel", "1.0", "tiny_wheel-1.0-py3-none-any.whl", content)
    path = archives.fetch(tiny)
    assert path.read_bytes() == content
    assert archives.read_one(path, r"data\.txt$") == b"seven"
    assert "tiny-wheel 1.0" in capfd.readouterr().err
    (pip_index / "tiny_wheel-1.0-py3-none-any.whl").unlink()
    assert archives.fetch(tiny) == path, "the second time it comes from the cache"
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [], "no temporary folder is left"


def test_source_archive_is_fetched_without_running_it(pip_index, tmp_path):
    trace = tmp_path / "ran"
    code = f"open({str(trace)!r}, 'w').write('ran')\nfrom setuptools import setup\nsetup(name='tiny-source')"
    content = tarball("tiny-source-1.0", {"setup.py": code, "PKG-INFO": "Name: tiny-source", "rows.csv": "a,b"})
    (pip_index / "tiny-source-1.0.tar.gz").write_bytes(content)
    path = archives.fetch(entry("pypi", "tiny-source", "1.0", "tiny-source-1.0.tar.gz", content))
    assert archives.read_one(path, r"rows\.csv$") == b"a,b"
    assert not trace.exists()


class _Registry(BaseHTTPRequestHandler):
    """As much of an npm registry as serving one package needs."""

    tarball = b""

    def do_GET(self):
        base = f"http://127.0.0.1:{self.server.server_port}"
        document = {
            "name": "tiny-npm",
            "dist-tags": {"latest": "1.0.0"},
            "versions": {
                "1.0.0": {"name": "tiny-npm", "version": "1.0.0", "dist": {"tarball": f"{base}/tiny-npm-1.0.0.tgz"}}
            },
        }
        body = self.tarball if self.path.endswith(".tgz") else json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_package_is_fetched(monkeypatch):
    script = json.dumps({"name": "tiny-npm", "version": "1.0.0", "scripts": {"prepack": "exit 7", "prepare": "exit 7"}})
    _Registry.tarball = tarball("package", {"package.json": script, "data.bin": "eleven"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("npm_config_userconfig", "/dev/null")
    try:
        path = archives.fetch(entry("npm", "tiny-npm", "1.0.0", "tiny-npm-1.0.0.tgz", _Registry.tarball))
    finally:
        server.shutdown()
        server.server_close()
    assert archives.read_one(path, r"data\.bin$") == b"eleven"


def test_npm_missing(monkeypatch, cache):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ArchiveError, match=r"needs the `npm` client.*install Node") as caught:
        archives.fetch(entry("npm", "tiny-npm", "1.0.0", "tiny-npm-1.0.0.tgz", b""))
    assert str(cache) in str(caught.value)


def put(cache, archive: Archive, content: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / archive.file).write_bytes(content)


def test_other_content_is_refused_and_removed(cache):
    good = entry("pypi", "x", "1", "x-1.whl", b"expected")
    put(cache, good, b"tampered")
    with pytest.raises(ArchiveError, match=r"x-1\.whl of x 1 .*other content than expected"):
        archives.fetch(good)
    assert not good.path.exists()


def test_truncated_archive_is_refused_and_removed(cache):
    good = entry("pypi", "x", "1", "x-1.whl", wheel())
    put(cache, good, wheel()[:100])
    with pytest.raises(ArchiveError, match=r"is truncated: 100 bytes"):
        archives.fetch(good)
    assert not good.path.exists()


def test_a_registry_that_serves_something_else_is_noticed(pip_index):
    (pip_index / "tiny_wheel-1.0-py3-none-any.whl").write_bytes(wheel())
    wrong = replace(entry("pypi", "tiny-wheel", "1.0", "tiny_wheel-1.0-py3-none-any.whl", wheel()), sha256="0" * 64)
    with pytest.raises(ArchiveError, match="other content"):
        archives.fetch(wrong)
    assert not wrong.path.exists()


@pytest.mark.parametrize("file", ["tiny_wheel-1.0-py3-none-any.whl", "tiny-wheel-1.0.tar.gz"])
def test_offline_message_names_package_and_folder(pip_index, cache, file):
    with pytest.raises(ArchiveError, match=r"Could not fetch .* of tiny-wheel 1\.0") as caught:
        archives.fetch(entry("pypi", "tiny-wheel", "1.0", file, b""))
    assert str(cache) in str(caught.value)


def test_no_member(pip_index):
    (pip_index / "tiny_wheel-1.0-py3-none-any.whl").write_bytes(wheel())
    path = archives.fetch(entry("pypi", "tiny-wheel", "1.0", "tiny_wheel-1.0-py3-none-any.whl", wheel()))
    with pytest.raises(ArchiveError, match="no member"):
        archives.read_one(path, "nothing")


def _fetch_in_child(archive: Archive) -> bytes:
    return archives.fetch(archive).read_bytes()


def test_two_processes_at_once(pip_index):
    content = wheel()
    (pip_index / "tiny_wheel-1.0-py3-none-any.whl").write_bytes(content)
    tiny = entry("pypi", "tiny-wheel", "1.0", "tiny_wheel-1.0-py3-none-any.whl", content)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_fetch_in_child, [tiny, tiny]) == [content, content]


def debian_package(files: dict[str, str]) -> bytes:
    """An ar archive of two members, the second with the files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    parts = {"debian-binary": b"2.0", "data.tar.xz": data.getvalue()}  # the first of odd length, so it is padded
    made = b"!<arch>\n"
    for name, content in parts.items():
        made += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


def test_debian_package_is_read(cache):
    content = debian_package({"tiny/data.txt": "eleven", "tiny/other.txt": "twelve"})
    archive = entry("debian", "tiny", "1.0-1", "tiny_1.0-1_all.deb", content)
    archive.path.parent.mkdir(parents=True, exist_ok=True)
    archive.path.write_bytes(content)  # as put there by hand
    assert dict(archives.read(archives.fetch(archive), r"data\.txt$")) == {"./usr/share/tiny/data.txt": b"eleven"}
    hollow = archive.path.with_name("hollow.deb")
    hollow.write_bytes(b"!<arch>\n")
    with pytest.raises(ArchiveError, match="no Debian package"):
        archives.read_one(hollow, "x")


def test_debian_client_missing(monkeypatch, cache):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ArchiveError, match="needs the `apt-get` client"):
        archives.fetch(entry("debian", "tiny", "1.0-1", "tiny_1.0-1_all.deb", b"x"))
