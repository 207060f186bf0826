"""The manifests, as far as they can be checked without a cluster: by the schemas of Kubernetes and of KubeRay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml

from calotype_server.settings import BridgeSettings, Settings

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "service" / "kubernetes"
RAY_SERVICE = ROOT / "tests" / "support" / "kuberay" / "rayservice.json"
VERSION = "1.33"
READERS = {"serve": Settings, "bridge": BridgeSettings}


def documents(path: Path) -> list[dict[str, Any]]:
    """All of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of it, as far as these use it: resources, patches of one kind, but no images."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = folder / name
        found += kustomized(path) if path.is_dir() else documents(path)
    for patch in kustomization.get("patches", ()):
        target = patch["target"]
        (index,) = (
            index
            for index, each in enumerate(found)
            if (each["kind"], each["metadata"]["name"]) == (target["kind"], target["name"])
        )
        found[index] = jsonpatch.apply_patch(found[index], yaml.safe_load(patch["patch"]))
    return found


def plain() -> list[Any]:
    """The documents that go to a cluster without Ray, each with its name."""
    return [
        pytest.param(each, id=f"{folder}-{each['kind']}-{each['metadata']['name']}")
        for folder in ("base", "gpu")
        for each in kustomized(MANIFESTS / folder)
    ]


def ray_service() -> dict[str, Any]:
    """The one document of it."""
    (document,) = documents(MANIFESTS / "rayservice.yaml")
    return document


def ray_pods() -> list[dict[str, Any]]:
    """Templates of the head and of the workers."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def deployments() -> list[dict[str, Any]]:
    """On CPUs and GPUs."""
    return [each.values[0] for each in plain() if each.values[0]["kind"] == "Deployment"]


def containers() -> list[dict[str, Any]]:
    """All, those of Ray as well."""
    pods = [each["spec"]["template"] for each in deployments()] + ray_pods()
    return [container for pod in pods for container in pod["spec"]["containers"]]


def closed(schema: Any) -> Any:
    """A schema that knows of no further properties: the server drops what is misspelt."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("document", plain())
def test_kubernetes_takes_the_manifest(document: dict[str, Any]) -> None:
    """By its own schemas, strictly: an unknown field is an error."""
    kubernetes_validate.validate(document, VERSION, strict=True)


def test_an_unknown_field_would_be_noticed() -> None:
    """In a pod, in a patch's result, and in a RayService."""
    (deployment, *_) = documents(MANIFESTS / "base" / "replicas.yaml")
    deployment["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)
    spec = ray_service()["spec"]
    spec["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, closed(json.loads(RAY_SERVICE.read_text())))


def test_kuberay_takes_the_manifest() -> None:
    """By an excerpt of its own schema; pods, which are left out there, by that of Kubernetes."""
    document = ray_service()
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(document["spec"], closed(json.loads(RAY_SERVICE.read_text())))
    for pod in ray_pods():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, VERSION, strict=True)


def test_every_variable_is_a_setting_with_a_value_that_it_takes() -> None:
    """Of the command that the container runs."""
    for deployment in deployments():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (command,) = container["args"]
        given = {each["name"]: each["value"] for each in container["env"]}
        assert all(isinstance(value, str) for value in given.values())
        READERS[command](**{name.removeprefix("CALOTYPE_").lower(): value for name, value in given.items()})
        # What the image listens on is what the ports say.
        ports = {port["containerPort"] for port in container["ports"]}
        image = re.findall(r"CALOTYPE_(GRPC|WEB)_ADDRESS=0\.0\.0\.0:(\d+)", (ROOT / "service/Dockerfile").read_text())
        assert ports <= {int(port) for _, port in image}


def test_there_is_time_to_drain() -> None:
    """The kubelet waits longer than the container takes."""
    for deployment in deployments():
        pod = deployment["spec"]["template"]["spec"]
        given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] >= float(given["CALOTYPE_DRAIN_SECONDS"]) + 15
    serve = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    *_, worker = ray_pods()
    grace = serve["graceful_shutdown_timeout_s"]
    assert worker["spec"]["terminationGracePeriodSeconds"] >= grace + 15
    assert grace > float(serve["ray_actor_options"]["runtime_env"]["env_vars"]["CALOTYPE_DRAIN_SECONDS"])


def test_nothing_has_more_rights_than_it_needs() -> None:
    """No root, nothing to gain; without Ray, which writes its logs where it likes, no file to change either."""
    for pod in [each["spec"]["template"] for each in deployments()] + ray_pods():
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert f"USER {pod['spec']['securityContext']['runAsUser']}\n" in (ROOT / "service/Dockerfile").read_text()
    for container in containers():
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})
        assert "memory" in container["resources"]["limits"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)
    for deployment in deployments():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert deployment["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_what_selects_pods_finds_them() -> None:
    """Services, budgets and policies by labels, ports by names, and the bridge its upstream by the Service's name."""
    found = [each.values[0] for each in plain()]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in deployments()]
    for each in found:
        spec = each["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        selector = selector.get("matchLabels", selector)
        assert any(selector.items() <= pod.items() for pod in labels), each["metadata"]
    headless = {each["metadata"]["name"] for each in found if each["spec"].get("clusterIP") == "None"}
    bridge = next(each for each in deployments() if each["metadata"]["name"] == "calotype-bridge")
    (upstream,) = (
        each["value"]
        for each in bridge["spec"]["template"]["spec"]["containers"][0]["env"]
        if each["name"] == "CALOTYPE_UPSTREAM"
    )
    assert re.fullmatch(r"dns:///(\w+):50051", upstream)[1] in headless


def test_ray_is_started_as_elsewhere() -> None:
    """With the same configuration, but for the size of a replica and the source of health checks, in the same mode."""
    here = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    there = yaml.safe_load((ROOT / "service" / "ray.yaml").read_text())
    here["http_options"]["host"] = there["http_options"]["host"]
    for configuration in (here, there):
        configuration["applications"][0]["deployments"][0]["ray_actor_options"].pop("num_cpus")
    assert here == there
    lines = (ROOT / "service" / "ray.env").read_text().splitlines()
    mode = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    for pod in ray_pods():
        assert {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"]} == mode


def test_variables_of_rays_replicas_are_settings() -> None:
    """They reach them through the environment of the actor."""
    actor = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    variables = actor["ray_actor_options"]["runtime_env"]["env_vars"]
    Settings(**{name.removeprefix("CALOTYPE_").lower(): value for name, value in variables.items()})
