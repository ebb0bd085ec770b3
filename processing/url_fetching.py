"""Fetch audio files from URLs that the caller has allowed by prefix.

A server that fetches any URL can be misled to addresses in its own network. So a URL is fetched only if it begins with
an allowed prefix, which includes the host. The same holds for redirects. Leaves out: authentication, caching, retries.
"""

import http.client
import time
import urllib.request
from urllib.parse import unquote, urlsplit

MAX_BYTES = 64 * 2**20
# Limits between two packets, and for the whole fetch.
SILENCE_TIMEOUT_S = 10.0
TIMEOUT_S = 60.0


def fetch_audio(url: str, allowed_prefixes: list[str] | tuple[str, ...] = ()) -> bytes:
    """Fetch the contents of an audio file.

    Args:
        url (`str`): http or https.
        allowed_prefixes (`Sequence[str]`): the URL and its redirects must begin with one of these. Each has scheme,
            host and at least the slash after it, as in `"https://host/"`.

    Raises:
        ValueError: the URL is not allowed, cannot be fetched within a minute, or holds more than 64 MiB.
    """
    _check(url, allowed_prefixes)
    opener = urllib.request.build_opener(_HeldRedirects(allowed_prefixes))
    deadline = time.monotonic() + TIMEOUT_S
    contents = bytearray()
    try:
        with opener.open(url, timeout=SILENCE_TIMEOUT_S) as response:
            while block := response.read1(2**16):
                contents += block
                if len(contents) > MAX_BYTES:
                    raise ValueError(f"{url!r} holds more than {MAX_BYTES} bytes. Cut it, or download it first.")
                if time.monotonic() > deadline:
                    raise ValueError(f"{url!r} was not fetched within {TIMEOUT_S:g} s. Download it first.")
    except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
        raise ValueError(f"{url!r} cannot be fetched: {error}.") from error
    return bytes(contents)


class _HeldRedirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allowed_prefixes):
        self.allowed_prefixes = allowed_prefixes

    def redirect_request(self, request, file, code, message, headers, url):
        _check(url, self.allowed_prefixes)
        return super().redirect_request(request, file, code, message, headers, url)


def _check(url: str, allowed_prefixes):
    if isinstance(allowed_prefixes, str):
        raise TypeError(f"allowed_url_prefixes must be a list or tuple of strings, got {allowed_prefixes!r}.")
    for prefix in allowed_prefixes:
        parts = urlsplit(prefix)
        # Without the slash, "https://host" would also allow "https://host.elsewhere.org".
        if parts.scheme not in ("http", "https") or not parts.netloc or not parts.path.startswith("/"):
            raise ValueError(
                f"An allowed URL prefix looks like 'https://host/' or 'https://host/path/', got {prefix!r}."
            )
    climbs = ".." in unquote(urlsplit(url).path).replace("\\", "/").split("/")
    if climbs or not any(url.startswith(prefix) for prefix in allowed_prefixes):
        raise ValueError(
            f"Fetching {url!r} is not allowed. Allowed are URLs that begin with one of {list(allowed_prefixes)}: pass "
            "allowed_url_prefixes=('https://host/path/',) to the pipeline, or download the file first."
        )
