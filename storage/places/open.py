"""Open the place that a location names: a folder of this machine, or a bucket."""

from softlabel.storage.errors import UsageError
from softlabel.storage.location import located
from softlabel.storage.places.place import Place


def place_of(location: str) -> Place:
    """The place that a table's location names.

    Args:
        location: path of a folder, or s3://BUCKET/PREFIX.

    Raises:
        UsageError: if it is a URL of another kind, or holds credentials.
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
        from softlabel.storage.places.bucket import Bucket  # its library loads only where there is a bucket

        return Bucket(location)
    from softlabel.storage.places.folder import Folder

    return Folder(location)
