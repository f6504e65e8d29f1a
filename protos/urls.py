"""URLs in place of paths: what is one, and whether it lies under another.

Rules: text alone decides, nothing is opened. A path never reads as a URL by accident: it takes a scheme and `://`.
"""

import re

# Stores on other machines. `file` and its like name this machine's files, past the rules for paths; others read what a
# URL names by the way of programs or archives.
STORE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "webhdfs", "https", "http")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AUTHORITY = re.compile(r"(?P<scheme>[^:]*://)(?P<user>[^/?#]*@)?(?P<rest>[^?#]*)")


def is_url(text: str) -> bool:
    """Whether it begins with a scheme, as `s3://bucket/key` does."""
    return _URL.match(text) is not None


def is_in_store(url: str) -> bool:
    """Whether its scheme is that of a store on another machine."""
    return url.partition("://")[0].lower() in STORE_SCHEMES


def holds_credentials(url: str) -> bool:
    """Whether a user, and so perhaps a password, stands before the host."""
    parts = _AUTHORITY.match(url)
    return parts is not None and parts["user"] is not None


def shown(url: str) -> str:
    """The URL for messages: without user and password, and without the query, which may hold a signature."""
    parts = _AUTHORITY.match(url)
    return parts["scheme"] + parts["rest"] if parts else url


def is_under(url: str, root: str) -> bool:
    """Whether the URL is the root or lies below it; never with a part `..`, plain or percent-encoded."""
    steps = url.lower().replace("%2e", ".").replace("%2f", "/").replace("\\", "/").split("/")
    return ".." not in steps and (url == root or url.startswith(root.rstrip("/") + "/"))
