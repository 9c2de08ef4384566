"""Detects and masks credentials in locations, so that they never end up in logs, records and reports.

A location is a path or a URL. The bucket or host of a URL may contain no user, key or password and nothing that is
percent-encoded, and a URL may have no parameters. After the bucket comes an object key, which may contain an @. Only in
the URL of a container of Azure, abfss://CONTAINER@ACCOUNT.dfs.core.windows.net, a name comes before an @.
"""

import re

_AZURE = r"abfss?://[a-z0-9$-]{1,63}@[a-z0-9]{3,24}\.dfs\.core\.windows\.net(?:/|$)"
_URL = (
    rf"(?!{_AZURE})"
    # SCHEME://KEY:SECRET@BUCKET with any number of slashes, or s3:KEY:SECRET@BUCKET without; a host may have a port
    r"(?:[^/\\]*:\s*[/\\][/\\\s]*|\s*[sS]3[aAnN]?:)[^/\\]*(?:[@%?#]|:(?!\d+(?:[/\\]|$)))"
    # SCHEME://BUCKET/KEY?PARAMETER=SECRET; the ? of a glob has no = between it and the next slash
    r"|[^/\\]*:\s*[/\\][\s\S]*[?#][^/\\]*="
)
_CREDENTIALS = re.compile(_URL)
_CONTAINER = re.compile(rf"{_AZURE}[^?#]*")
# The same inside a text, where spaces, quotes and commas end a URL. A scheme begins at the start of a word; tried from
# each of its letters, a very long word would take minutes.
_IN_TEXT = re.compile(
    r"""(?:(?<![\w+.-])[\w+.-]*:[/\\]+|\b[sS]3[aAnN]?:)(?:[^/\\\s'"`,]*(?:[@%?#]|:(?!\d+(?:[/\\\s'"`,)]|$)))|[^\s'"`,]*[?#][^/\\\s'"`,]*=)[^\s'"`,]*"""
)

WITHOUT_CREDENTIALS = f"^(?!{_URL})"
"""Pattern for JSON Schema, so that other programs can reject such a location before they run softlabel."""


def holds_credentials(location: str) -> bool:
    """Whether a path or a URL may contain credentials."""
    return _CREDENTIALS.match(location) is not None


def masked(text: str) -> str:
    """The text with each URL that contains credentials replaced."""
    return _IN_TEXT.sub(lambda url: url[0] if _CONTAINER.fullmatch(url[0]) else "(a location with credentials)", text)
