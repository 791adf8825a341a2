"""Files from the internet: checked, and in place only when they are whole and the right ones."""
from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from cleanai import __version__
from cleanai.runtime.files import replacing
from cleanai.runtime.progress import progress

# What `download` raises; of a disk that takes no more, too.
FAILURES = (OSError, http.client.HTTPException)


def download(url: str, path: Path, algorithm: str, checksum: str) -> None:
    """Fetch `url` into `path`; one of FAILURES unless its size is as told and its checksum begins with `checksum`.

    `algorithm` is a name of hashlib's, such as "sha256".
    """
    request = urllib.request.Request(url, headers={"User-Agent": f"cleanai/{__version__}"})
    digest = hashlib.new(algorithm)
    with replacing(path) as file, urllib.request.urlopen(request, timeout=60) as response:
        size = response.length  # None when the server does not tell
        blocks = iter(lambda: response.read(2**20), b"")
        for block in progress(blocks, f"Downloading {path.name}", "MiB", size and size // 2**20):
            digest.update(block)
            file.write(block)
        if size is not None and file.tell() != size:
            raise OSError(f"the connection ended after {file.tell():,} of {size:,} bytes")
        if not digest.hexdigest().startswith(checksum):
            raise OSError(f"its {algorithm.upper()} is not that of the published file")
