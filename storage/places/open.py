"""Open the place at a location: a local folder or a bucket."""

from softlabel.storage.errors import UsageError
from softlabel.storage.location import located
from softlabel.storage.places.place import Place


def place_of(location: str) -> Place:
    """The place at a table's location.

    Args:
        location: path of a folder, or s3://BUCKET/PREFIX.

    Raises:
        UsageError: if it is another kind of URL, or contains credentials.
    """
    location = located(location)
    scheme, separator, rest = location.partition("://")
    if separator and (scheme != "s3" or not rest.partition("/")[0]):
        raise UsageError(
            "softlabel can't use a table at this location",
            expected="the path of a folder, or s3://BUCKET/PREFIX",
            found=location,
        )
    if separator:
        from softlabel.storage.places.bucket import Bucket  # so that its library is loaded only for a bucket

        return Bucket(location)
    from softlabel.storage.places.folder import Folder

    return Folder(location)
