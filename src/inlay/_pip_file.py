"""Download one named file of a PyPI package with pip's own index settings, without building anything.

Run as a script in a child process: ``python _pip_file.py PACKAGE FILE FOLDER``. `pip download` would run the build
code of a source archive to learn its dependencies; here pip only finds the link (its index, proxy, certificates and
log-in as the user configured them) and hands over the bytes. These are internals of pip, hence the child process:
whatever changes in them ends in a non-zero exit that `inlay.archives` explains.
"""

import sys
from pathlib import Path

from pip._internal.commands import create_command


def main(package: str, file: str, folder: str) -> int:
    """Write FILE of PACKAGE into FOLDER; 0 when done, 1 when the index does not list that file."""
    command = create_command("download")
    options, _ = command.parse_args(["--no-cache-dir", "--quiet", package])
    session = command._build_session(options)  # type: ignore[attr-defined]
    finder = command._build_package_finder(options, session)  # type: ignore[attr-defined]
    links = [c.link for c in finder.find_all_candidates(package) if c.link.filename == file]
    if not links:
        print(f"the configured index lists no {file} for {package}", file=sys.stderr)
        return 1
    # identity: the archive itself, not an archive unpacked by a helpful server
    reply = session.get(links[0].url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
    reply.raise_for_status()
    with open(Path(folder) / file, "wb") as out:
        for block in reply.iter_content(1 << 20):
            out.write(block)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
