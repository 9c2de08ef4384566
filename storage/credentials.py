"""What no location may hold: credentials, which would be kept in logs, records and reports for as long as these are.

A location is a path or a URL. The part of a URL that names its bucket or host may hold no user, key or password, and
nothing that is percent-encoded, and a URL has no parameters. What follows the bucket is a key, which may hold an @.
"""

import re

_URL = (
    # SCHEME://KEY:SECRET@BUCKET with any number of slashes, or s3:KEY:SECRET@BUCKET without; a host may have a port
    r"(?:[^/\\]*:\s*[/\\][/\\\s]*|\s*[sS]3[aAnN]?:)[^/\\]*(?:[@%?#]|:(?!\d+(?:[/\\]|$)))"
    # SCHEME://BUCKET/KEY?PARAMETER=SECRET; the ? of a glob is followed by no = before the next slash
    r"|[^/\\]*:\s*[/\\][\s\S]*[?#][^/\\]*="
)
_CREDENTIALS = re.compile(_URL)
_IN_TEXT = re.compile(  # the same, where words, quotes and commas end a URL
    r"""(?:[\w+.-]*:[/\\]+|\b[sS]3[aAnN]?:)(?:[^/\\\s'"`,]*(?:[@%?#]|:(?!\d+(?:[/\\\s'"`,)]|$)))|[^\s'"`,]*[?#][^/\\\s'"`,]*=)[^\s'"`,]*"""
)

WITHOUT_CREDENTIALS = f"^(?!{_URL})"
"""As a pattern of JSON Schema, for who judges a location before anything is run here."""


def holds_credentials(location: str) -> bool:
    """Whether a path or a URL holds what may be credentials."""
    return _CREDENTIALS.match(location) is not None


def masked(text: str) -> str:
    """A text for people, without the URLs in it that hold credentials."""
    return _IN_TEXT.sub("(a location with credentials)", text)
