"""Child processes: their errors are raised here, and they import exactly the modules that their parent does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel.pipeline.processes import Child, ChildDiedError, Warned, messages
from softlabel.storage.errors import SoftlabelError, TeacherError, WorkerError
from tests.conftest import ROOT

SPEAKING = "tests.pipeline.speaking"


def end(child: Child) -> None:
    """Kill a child and leave no zombie."""
    child.process.kill()
    child.process.wait()


@pytest.mark.parametrize(
    ("raised", "kind", "message", "details"),
    [
        ("ours", TeacherError, "a teacher\n  found:       nothing", {"positions": [1, 2]}),
        ("of an engine", TeacherError, "OfMyEngineError: no room", {"bytes": 7}),
        ("of no class of its own", SoftlabelError, "in general", None),
        ("of a library", WorkerError, "ValueError: 3 is no 4", None),
        ("of another's name", WorkerError, "TableError: of a restaurant", None),
    ],
)
def test_a_childs_error_keeps_its_class_its_text_and_its_details(raised, kind, message, details, tmp_path: Path):
    child = Child(SPEAKING, raised, log=tmp_path / "log")
    received = messages([child])
    assert len(next(received)[2]["text"]) == 500_000
    with pytest.raises(SoftlabelError) as error:
        next(received)
    assert (type(error.value), str(error.value), error.value.details) == (kind, message, details)
    end(child)
    assert (tmp_path / "log").read_text() == "what a library prints\n"


def test_details_that_json_can_not_represent_still_arrive(tmp_path: Path):
    child = Child(SPEAKING, "with odd details", log=tmp_path / "log")
    with pytest.raises(TeacherError, match="odd") as error:
        list(messages([child]))
    assert json.dumps(error.value.details)
    end(child)


def test_what_children_warn_of_is_in_the_log_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    warned = Warned()
    children = [Child(SPEAKING, "warns", log=tmp_path / name, warned=warned) for name in ("a", "b")]
    received = messages(children)
    with pytest.warns() as said:
        assert {next(received)[1], next(received)[1]} == {"progress"}
    for child in children:
        end(child)
    warnings = [warning for warning in said if warning.category is not ResourceWarning]  # those are of other tests
    assert [str(warning.message) for warning in warnings] == ["deprecated"]
    assert [(record.levelname, record.message) for record in caplog.records if "number" not in record.message] == [
        ("WARNING", "library.of.models: 7 tokens are too many"),
        ("WARNING", "library.of.models: %d tokens"),
        ("ERROR", r"library.of.models: from a document: \x1b[31m\r"),
        ("WARNING", "library.of.models: no access to (a location with credentials)"),
        ("WARNING", "ours"),
    ]
    assert len(caplog.records) <= 100  # a warning may have a number in it
    assert "no warning" in (tmp_path / "a").read_text()


def test_an_error_of_a_child_that_has_ended_since_is_raised(tmp_path: Path):
    child = Child(SPEAKING, "of a library", log=tmp_path / "log")
    received = messages([child])
    next(received)
    child.process.stdin.close()
    child.process.wait(300)
    with pytest.raises(WorkerError, match="ValueError: 3 is no 4"):
        next(received)


def test_a_death_takes_precedence_over_an_error_of_another_child(tmp_path: Path):
    children = [Child(SPEAKING, what, log=tmp_path / what) for what in ("of a library", "dies")]
    with pytest.raises(ChildDiedError) as death:
        list(messages(children))
    assert death.value.child is children[1]
    assert "SIGKILL" in children[1].death()
    for child in children:
        end(child)


RUN = [sys.executable, "-m", SPEAKING, "modules"]
PROGRAM = "import sys; sys.argv[1:] = ['modules']; from tests.pipeline.speaking import main; main()"


@pytest.mark.parametrize("path", ["{root}", "{root}:", ":{root}", "{root}::{other}"])
@pytest.mark.parametrize("command", [RUN, [sys.executable, "-c", PROGRAM]], ids=["-m", "-c"])
def test_a_child_imports_nothing_from_the_folder_where_the_command_was_started(command, path, tmp_path: Path):
    found = modules(command, path, tmp_path)
    assert str(ROOT) in found
    assert not [each for each in found if not each or Path(each, "here").exists()], found


def test_a_child_imports_from_that_folder_if_pythonpath_names_it_or_the_program_is_in_it(tmp_path: Path):
    assert str(tmp_path) in modules(RUN, "{root}:.", tmp_path)
    assert str(tmp_path) in modules(RUN, "{here}:{root}", tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    assert str(tmp_path) in modules([sys.executable, "program.py"], "{root}", tmp_path)
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(tmp_path / "program.py", package / "program.py")
    assert str(tmp_path) in modules([sys.executable, "-m", "package.program"], "{root}", tmp_path)


def test_a_folder_with_a_colon_in_its_name_is_not_split_in_two(tmp_path: Path):
    code = PROGRAM.replace("import sys;", "import sys; sys.path.insert(0, '/somewhere:here');")
    assert not {"/somewhere", "here"} & {*modules([sys.executable, "-c", code], "{root}", tmp_path)}


def modules(command: list[str], path: str, folder: Path) -> list[str]:
    """The folders in which a child of this command, started in this folder, would search for modules."""
    (folder / "here").touch()
    environment = os.environ | {"PYTHONPATH": path.format(root=ROOT, here=folder, other="/nowhere")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().split(os.pathsep)


CLOSED = """
import os
import sys
from contextlib import suppress
from pathlib import Path
from softlabel.pipeline.processes import Child, messages

child = Child("tests.pipeline.speaking", "ours", log=Path(sys.argv[1], "log"))
for descriptor in (1, 2):  # as native libraries print
    with suppress(OSError):
        os.write(descriptor, b"what this process prints\\n")
Path(sys.argv[1], "received").write_text(next(messages([child]))[1])
child.process.stdin.close()
assert child.process.wait() == 0
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_child_needs_none_of_its_parents_standard_descriptors(closed: str, tmp_path: Path):
    command = f'exec "$0" -c "$1" "$2" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, CLOSED, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "received").read_text() == "progress"
    assert (tmp_path / "log").read_text() == "what a library prints\n"
