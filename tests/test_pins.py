"""What ``make`` installs: constraints.txt pins versions that all who need them can work with."""

import re
import tomllib
from importlib.metadata import distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
VERSIONS = {canonicalize_name(name): version for name, version in PINS.items()}
CARRIERS = re.search(r"^CARRIERS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
"""Packages of which we need but a file: what they ask for is not installed."""


def asked_of_us() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    return project["dependencies"] + [each for each in extras if not each.startswith("softlabel")]


def refused(requirements: list[str]) -> list[str]:
    found = map(Requirement, requirements)
    wanted = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    pins = [(each, VERSIONS.get(canonicalize_name(each.name))) for each in wanted]
    return [f"{each}, pinned at {pin}" for each, pin in pins if pin is not None and pin not in each.specifier]


def test_the_pins_are_what_we_ask_for():
    assert refused(asked_of_us()) == []


def test_the_pins_are_what_each_package_asks_for():
    carriers = {canonicalize_name(each.split("==")[0]) for each in CARRIERS}
    others = [each for each in distributions() if canonicalize_name(each.name) in VERSIONS.keys() - carriers]
    found = {each.name: refused(each.requires or []) for each in others}
    assert {name: each for name, each in found.items() if each} == {}
