"""The compose file, the Kubernetes example and the Dockerfile: valid, hardened, documented, and without a secret."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prefect.settings import Settings
from prefect.settings.legacy import _get_valid_setting_names

from tests.conftest import ROOT

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("softlabel-")]
MANIFESTS = [
    pytest.param(manifest, id=f"{path.name}:{manifest['kind']}:{manifest['metadata']['name']}")
    for path in sorted(DOCKER.glob("kubernetes/*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
SECRET = re.compile(r"PASSWORD|SECRET|KEY|TOKEN|AUTH|CONNECTION_URL")
VARIABLE = re.compile(r"\$\{(\w+)(:\?[^}]+)?")


def documented() -> dict[str, str]:
    """The variables of .env.example with their values."""
    return dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))


def test_the_compose_file_fits_the_compose_specification():
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_the_kubernetes_example_fits_the_schemas_of_kubernetes(manifest: dict[str, Any]):
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_hadolint_finds_nothing_in_the_dockerfile():
    command = [Path(sys.executable).with_name("hadolint"), DOCKER / "Dockerfile"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.stdout + found.stderr, found.returncode) == ("", 0)


def test_no_secret_has_a_value_and_compose_refuses_to_start_without_each():
    required = set()
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            found = dict(VARIABLE.findall(str(value)))
            if SECRET.search(name) and name != "HF_TOKEN":  # which most sites don't need
                assert found, f"{name} has a literal value"
                assert all(found.values()), f"{name} does not refuse an empty value"
                required |= found.keys()
    assert required == {name for name in documented() if SECRET.search(name)} - {"HF_TOKEN"}
    assert not any(documented()[name] for name in required | {"HF_TOKEN"})
    for manifest in MANIFESTS:
        for container in containers(manifest.values[0]):  # type: ignore[arg-type]
            assert not [each["name"] for each in container.get("env", ()) if SECRET.search(each["name"])]


def test_each_variable_of_the_compose_file_is_documented_and_no_other():
    used = {name for name, _ in VARIABLE.findall((DOCKER / "compose.yaml").read_text())}
    assert used | {"COMPOSE_PROFILES"} == documented().keys()
    for block in (DOCKER / ".env.example").read_text().split("\n\n"):
        assert block.startswith("# "), f"{block} has no explanation"


def test_the_runbook_describes_each_service_and_names_no_other():
    runbook = (DOCKER / "README.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", runbook, re.MULTILINE) == list(SERVICES)
    command = r"docker compose (?:exec|logs|kill|restart|run .*--entrypoint tar)(?: -T)? ([\w-]+)"
    assert set(re.findall(command, runbook)) <= SERVICES.keys()


def test_prefect_knows_each_of_its_settings_by_that_name():
    # It ignores a name that it does not know.
    texts = [path.read_text() for path in DOCKER.rglob("*") if path.is_file()]
    named = {name for text in texts for name in re.findall(r"\bPREFECT_(?!AUTH\b)[A-Z_]+", text)}
    assert len(named) > 10
    assert named <= _get_valid_setting_names(Settings)


def test_no_port_is_open_to_other_machines():
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_a_read_only_root_and_no_privileges(name: str):
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service  # the image's


@pytest.mark.parametrize("name", OURS)
def test_compose_builds_each_of_our_images(name: str):
    # Without `build`, it would look for the image in a registry.
    target = SERVICES[name]["build"]["target"]
    assert SERVICES[name]["image"] == f"softlabel-{target}:${{VERSION:-latest}}"
    assert f" AS {target}\n" in (DOCKER / SERVICES[name]["build"]["context"] / "docker/Dockerfile").read_text()


def containers(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "template" in manifest.get("spec", {}):
        yield from manifest["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("manifest", [each for each in MANIFESTS if "template" in each.values[0].get("spec", {})])  # type: ignore[union-attr]
def test_pods_have_a_read_only_root_and_no_privileges(manifest: dict[str, Any]):
    pod = manifest["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    for container in containers(manifest):
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


def test_each_image_runs_as_a_number_that_is_not_root():
    # Kubernetes can't tell whether a name is root's.
    stages = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    users = {stage.split()[2]: re.findall(r"^USER (.*)$", stage, re.MULTILINE) for stage in stages}
    assert [users[image] for image in ("server", "cpu-worker", "gpu-worker")] == [["10001:10001"]] * 3
