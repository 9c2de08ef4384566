"""The versions that constraints.txt pins satisfy every package that ``make`` installs."""

import re
import tomllib
from importlib.metadata import distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
VERSIONS = {canonicalize_name(name): version for name, version in PINS.items()}
CARRIERS = re.search(r"^CARRIERS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
"""Packages of which we need only a file; their dependencies are not installed."""


def our_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in project["optional-dependencies"].values() for each in extra]
    return project["dependencies"] + [each for each in extras if not each.startswith("softlabel")]


def unsatisfied(requirements: list[str]) -> list[str]:
    found = map(Requirement, requirements)
    wanted = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    pins = [(each, VERSIONS.get(canonicalize_name(each.name))) for each in wanted]
    return [f"{each}, pinned at {pin}" for each, pin in pins if pin is not None and pin not in each.specifier]


def test_the_pins_satisfy_our_requirements():
    assert unsatisfied(our_requirements()) == []


def test_the_pins_satisfy_the_requirements_of_each_package():
    carriers = {canonicalize_name(each.split("==")[0]) for each in CARRIERS}
    packages = [each for each in distributions() if canonicalize_name(each.name) in VERSIONS.keys() - carriers]
    found = {each.name: unsatisfied(each.requires or []) for each in packages}
    assert {name: each for name, each in found.items() if each} == {}
