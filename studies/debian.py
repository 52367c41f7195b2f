"""Files of Debian packages, downloaded once and checked."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import urllib.request
from collections.abc import Iterator

from ipca._atomic import write_atomic
from studies.cached_tensors import cache_folder


def package_files(url: str, sha256: str, names: re.Pattern[str]) -> Iterator[bytes]:
    """The package's files whose names match ``names`` as a whole, in the package's order.

    Raises:
        OSError: the package cannot be downloaded.
        ValueError: another file than expected.
    """
    path = cache_folder() / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer:
            write_atomic(path, answer.read())
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file of {url}; delete it to download it again")
    with tarfile.open(fileobj=io.BytesIO(_member(data, "data.tar.xz"))) as files:
        for member in files:
            file = files.extractfile(member) if member.isfile() and names.fullmatch(member.name) else None
            if file is not None:
                yield file.read()


def _member(archive: bytes, name: str) -> bytes:
    """A file in an ``ar`` archive, the container of Debian's packages."""
    position = 8
    while position < len(archive):
        header = archive[position : position + 60]
        size = int(header[48:58])
        if header[:16].decode().strip().rstrip("/") == name:
            return archive[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise ValueError(f"the package has no {name}")
