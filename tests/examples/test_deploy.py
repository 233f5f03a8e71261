"""The examples for containers and Kubernetes fit together, and give flags that there are. Kubernetes' schemas and a
linter of container files are not at hand here: `kubernetes-validate --strict`, `hadolint`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from miniserve.cli.main import State, app
from miniserve.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "examples" / "deploy"


def check_command(arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line of `miniserve` gives. Fails for one that it would refuse."""
    command = get_command(app)
    with command.make_context("miniserve", list(arguments), obj=State()) as context:
        name, serve, rest = command.resolve_command(context, arguments)  # type: ignore[attr-defined]
        with serve.make_context(name, rest, parent=context) as inner:
            return dict(inner.params)


def test_the_manifest_is_consistent() -> None:
    documents = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    assert set(documents) == {"Secret", "PersistentVolumeClaim", "Deployment", "Service"}
    deployment, service = documents["Deployment"]["spec"], documents["Service"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == service["selector"] == labels
    (port,) = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    settings = check_command(container["args"])
    assert settings["port"] == port["containerPort"] and settings["host"] == "0.0.0.0"
    gpus = {container["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    assert gpus == {str(settings["tensor_parallel_size"])}
    assert settings["drain_timeout"] < pod["terminationGracePeriodSeconds"]
    (key,) = [each["valueFrom"]["secretKeyRef"] for each in container["env"] if each["name"] == "MINISERVE_API_KEY"]
    assert key["name"] == documents["Secret"]["metadata"]["name"] and key["key"] in documents["Secret"]["stringData"]
    assert {each["name"] for each in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}
    (claim,) = [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if each["name"] == "data"]
    assert claim == documents["PersistentVolumeClaim"]["metadata"]["name"]
    assert container["image"] in (DEPLOY / "Dockerfile.cuda").read_text()


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_a_container_file_copies_what_is_there_and_serves(name: str) -> None:
    text = (DEPLOY / f"Dockerfile.{name}").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, flags=re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, flags=re.MULTILINE)
    assert f'{entry} = "miniserve.cli.main:main"' in (ROOT / "pyproject.toml").read_text()
    (arguments,) = re.findall(r"^CMD (\[.*\])$", text, flags=re.MULTILINE)
    assert check_command(yaml.safe_load(arguments))["host"] == "0.0.0.0"
    example = text.split(f"miniserve:{name} serve", 1)[1].splitlines()[0]
    assert EngineConfig(model=check_command(["serve", *shlex.split(example)])["model"]).model == "Qwen/Qwen3-8B"
    (low, high) = re.findall(r'"torch(>=[\d.]+),(<[\d.]+)"', (ROOT / "pyproject.toml").read_text())[0]
    assert name == "rocm" or f'"torch{low},{high}"' in text
