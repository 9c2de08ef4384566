"""Where documents can be, other than on this machine: buckets of S3, Google or Azure, and the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from softlabel.storage.errors import AccessError, UsageError, printable

_BUCKETS = ("s3", "gs", "abfss", "az")


class Entry(Protocol):
    """A file of a store."""

    @property
    def name(self) -> str:
        """Its key."""
        ...


class Store(Protocol):
    """Files under keys with slashes."""

    def where(self, name: str, /) -> str:
        """URL of a file."""
        ...

    def files(self, folder: str, /) -> Iterator[Entry]:
        """All files below a key."""
        ...

    def stat(self, name: str, /) -> object:
        """Raises FileNotFoundError if there is no such file."""
        ...

    def open(self, name: str, /) -> tuple[Any, object]:
        """The file, for random or sequential reading; and what is known about it."""
        ...


def store_of(scheme: str, root: str, path: str) -> Store:
    """The store at the first part of a URL: a bucket, or datasets, models and spaces on the hub.

    Raises:
        UsageError: if there is no store of this kind.
    """
    if scheme in _BUCKETS and root:
        from softlabel.storage.places.bucket import Bucket  # so that its library is loaded only for a bucket

        return Bucket(f"{scheme}://{root}")
    if scheme == "hf" and root:
        return Hub(root)
    raise UsageError(
        "softlabel can't read documents from this kind of address",
        expected="a path on this machine, s3://BUCKET/PATH, gs://BUCKET/PATH,\n"
        "               abfss://container@account.dfs.core.windows.net/PATH or hf://datasets/OWNER/NAME/PATH",
        found=printable(path),
        do="copy the documents to this machine or to one of these stores",
    )


class _HubFile(NamedTuple):
    name: str


class Hub:
    """Repositories of one kind on the Hugging Face hub, at a revision with hf://datasets/OWNER/NAME@REVISION/PATH."""

    def __init__(self, root: str) -> None:
        from huggingface_hub import HfFileSystem

        self._root = root
        self._files: Any = HfFileSystem()

    def where(self, name: str) -> str:
        """URL of the file."""
        return f"hf://{self._root}/{name}"

    def files(self, folder: str) -> Iterator[_HubFile]:
        """A request for each few hundred files."""
        with self._translating_errors(folder):
            try:
                found = self._files.find(f"{self._root}/{folder}")
            except FileNotFoundError:
                found = []
        yield from (_HubFile(path.removeprefix(f"{self._root}/")) for path in sorted(found))

    def stat(self, name: str) -> None:
        """One request."""
        with self._translating_errors(name):
            if not self._files.isfile(f"{self._root}/{name}"):
                raise FileNotFoundError(f"no such file: {self.where(name)}")

    def open(self, name: str) -> tuple[Any, None]:
        """A request for each few megabytes that are read."""
        with self._translating_errors(name):
            return self._files.open(f"{self._root}/{name}", "rb"), None

    @contextmanager
    def _translating_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # of the network, the hub, or the name
            raise AccessError(
                "the Hugging Face hub can't be used",
                expected="a repository that exists and that you may read, and a connection to the hub",
                found=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
                where=self.where(name),
                do="check the repository's name, HF_TOKEN if it is private, and HF_HUB_OFFLINE",
            ) from None
