"""Races in a real object store: writers that are killed, and many that want to be the first."""

import os
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue as Queue
from multiprocessing.synchronize import Barrier

import pytest

from softlabel.storage import committing
from softlabel.storage.errors import TableError
from softlabel.storage.places.open import place_of
from softlabel.storage.records.versions import tag, tags
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.verification import verify
from tests import buckets
from tests.storage.tables import PROCESSES, add, identity, make_table, names_in, process
from tests.storage.test_writer_failures import kill_writers

pytestmark = pytest.mark.long

RACERS = 6


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with buckets.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as url, buckets.environment(url):
        yield url


@pytest.fixture
def location() -> str:
    return f"{buckets.BUCKET}/{uuid.uuid4().hex}"


def test_of_many_conditional_puts_one_succeeds(location: str) -> None:
    """What the Delta log, the tags and the pins rely on."""
    place = place_of(location)

    def put(racer: int) -> int:
        try:
            place.write(f"race{race}", str(racer).encode(), replace=False)
        except FileExistsError:
            return 0
        return 1

    with ThreadPoolExecutor(RACERS) as pool:
        for race in range(20):
            assert sum(pool.map(put, range(RACERS))) == 1
            assert place.read(f"race{race}").decode() in map(str, range(RACERS))


def race(location: str, racer: int, start: Barrier, results: Queue) -> None:
    """Create a table, add to it and tag it, at the moment at which others do the same."""
    won = []
    for turn in range(5):
        start.wait(120)
        table = make_table(f"{location}/{turn}", identity(), racer)
        add(table, ["shared", f"own{racer}"], "train")
        start.wait(120)
        try:
            tag(table.location, racer % 2, "first")
            won.append((turn, racer % 2))
        except TableError:
            continue
    results.put(won)


def test_many_processes_create_add_and_tag_at_once(location: str) -> None:
    start, results = PROCESSES.Barrier(RACERS), PROCESSES.SimpleQueue()
    racers = [process(race, location, racer, start, results) for racer in range(RACERS)]
    for racer in racers:
        racer.start()
    won = [pair for _ in racers for pair in results.get()]
    for turn in range(5):
        table = Table.open(f"{location}/{turn}")
        assert names_in(table) == sorted(["shared", *(f"own{racer}" for racer in range(RACERS))])
        assert {version for at, version in won if at == turn} == {tags(table.location)["first"].version}
        assert verify(table).findings == ()


def die_before_commit(location: str) -> None:
    """Upload a shard, and die in the moment in which it would be committed."""
    committing.write_commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    add(Table.open(location), ["of the dead"])


def test_leftovers_of_killed_writers_are_found_and_removed(location: str) -> None:
    """51 kills: every row once, every committed shard readable, and what the dead have left is found and removed."""
    table = make_table(location, identity())
    kill_writers(table, 50)
    dies = process(die_before_commit, location)
    dies.start()
    dies.join()
    newest = table.newest()
    orphans = set(verify(newest, all_versions=True).orphans)
    assert orphans, "at least one died between upload and commit"
    assert orphans <= {leftover.path for leftover in maintain(location).spared}
    assert orphans <= {leftover.path for leftover in maintain(location, grace_hours=-1).deleted}
    found = verify(newest, all_versions=True)
    assert (found.findings, found.orphans) == ((), ())


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_reported_and_not_shown(
    location: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    make_table(location, identity())
    monkeypatch.setenv(variable, "somebody-else")
    with pytest.raises(TableError, match="can't be used") as error:
        Table.open(location)
    assert "somebody-else" not in str(error.value)
