"""Files from the internet."""

from __future__ import annotations

import http.client
import socket
import sys
from pathlib import Path

from torch.hub import download_url_to_file

FAILURES = (OSError, http.client.HTTPException, RuntimeError)  # what `download` raises
_TIMEOUT_S = 60


def download(url: str, path: Path, sha256_prefix: str | None = None) -> None:
    """Download `url` to `path`, which appears only when the download is complete.

    Raises one of FAILURES, also when the SHA-256 does not begin with `sha256_prefix`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)  # torch.hub sets none
    try:
        download_url_to_file(url, str(path), sha256_prefix, progress=sys.stderr is not None and sys.stderr.isatty())
    finally:
        socket.setdefaulttimeout(before)
