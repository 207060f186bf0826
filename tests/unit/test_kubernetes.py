"""The manifests, checked without a cluster against the schemas of Kubernetes and KubeRay."""

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

from calotype_server.apps import signals
from calotype_server.settings import BridgeSettings, Settings
from calotype_server.types import MemoryModel

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "service" / "kubernetes"
RAY_SERVICE = ROOT / "tests" / "support" / "kuberay" / "rayservice.json"
VERSION = "1.33"
READERS = {"serve": Settings, "bridge": BridgeSettings}


def documents(path: Path) -> list[dict[str, Any]]:
    """Returns all documents of a file."""
    return list(yaml.safe_load_all(path.read_text()))


def kustomized(folder: Path) -> list[dict[str, Any]]:
    """Returns the result of `kubectl kustomize` for the features used here: resources and JSON patches."""
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


def plain_documents() -> list[Any]:
    """Returns the documents of a cluster without Ray, each with its name."""
    return [
        pytest.param(each, id=f"{folder}-{each['kind']}-{each['metadata']['name']}")
        for folder in ("base", "gpu")
        for each in kustomized(MANIFESTS / folder)
    ]


def ray_service() -> dict[str, Any]:
    """Returns the RayService."""
    (document,) = documents(MANIFESTS / "rayservice.yaml")
    return document


def ray_pods() -> list[dict[str, Any]]:
    """Returns the pod templates of the head and the workers."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def deployments() -> list[dict[str, Any]]:
    """Returns all Deployments, for CPUs and GPUs."""
    return [each.values[0] for each in plain_documents() if each.values[0]["kind"] == "Deployment"]


def containers() -> list[dict[str, Any]]:
    """Returns all containers, including those of Ray."""
    pods = [each["spec"]["template"] for each in deployments()] + ray_pods()
    return [container for pod in pods for container in pod["spec"]["containers"]]


def closed(schema: Any) -> Any:
    """Returns a schema that forbids unknown properties. Kubernetes would silently drop a misspelt one."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.parametrize("document", plain_documents())
def test_kubernetes_accepts_the_manifest(document: dict[str, Any]) -> None:
    """Each manifest is valid under the schemas of Kubernetes, where an unknown field is an error."""
    kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_schemas_reject_unknown_fields() -> None:
    """A misspelt field in a pod or a RayService is an error."""
    (deployment, *_) = documents(MANIFESTS / "base" / "replicas.yaml")
    deployment["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)
    spec = ray_service()["spec"]
    spec["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, closed(json.loads(RAY_SERVICE.read_text())))


def test_kuberay_accepts_the_manifest() -> None:
    """The RayService is valid under an excerpt of KubeRay's schema, and its pods under the schema of Kubernetes."""
    document = ray_service()
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(document["spec"], closed(json.loads(RAY_SERVICE.read_text())))
    for pod in ray_pods():
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, VERSION, strict=True)


def test_every_variable_is_a_valid_setting() -> None:
    """Each variable of a container is a setting of its command, with a valid value."""
    for deployment in deployments():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (command,) = container["args"]
        given = {each["name"]: each["value"] for each in container["env"]}
        assert all(isinstance(value, str) for value in given.values())
        READERS[command](**{name.removeprefix("CALOTYPE_").lower(): value for name, value in given.items()})
        # The ports of the container are those that it listens on: by default of the image, and for probes.
        ports = {port["containerPort"] for port in container["ports"]}
        image = re.findall(r"CALOTYPE_(GRPC|WEB)_ADDRESS=0\.0\.0\.0:(\d+)", (ROOT / "service/Dockerfile").read_text())
        assert ports <= {int(port) for _, port in image} | {probe_port(container)}


def probe_port(container: dict[str, Any]) -> int:
    """Returns the port for probes that the variables of a container set."""
    (address,) = (each["value"] for each in container["env"] if each["name"] == "CALOTYPE_PROBE_ADDRESS")
    host, _, port = address.rpartition(":")
    assert host == "0.0.0.0"
    return int(port)


def test_probes_have_their_own_port() -> None:
    """The kubelet asks a port that no client can fill: a flood must not make it restart the container."""
    for deployment in deployments():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert numbers["probes"] == probe_port(container)
        asked = [container[name] for name in container if name.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in asked} == {"probes"}
        assert {probe["httpGet"]["path"] for probe in asked} == {"/healthz", "/readyz"}


def test_there_is_time_to_drain() -> None:
    """The kubelet waits longer than the server takes to drain and to end by itself, even if a thread hangs."""
    for deployment in deployments():
        pod = deployment["spec"]["template"]["spec"]
        given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        stopping = float(given["CALOTYPE_HANDOVER_SECONDS"]) + float(given["CALOTYPE_DRAIN_SECONDS"])
        assert pod["terminationGracePeriodSeconds"] > stopping + signals._STOP_SECONDS
    serve = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    *_, worker = ray_pods()
    grace = serve["graceful_shutdown_timeout_s"]
    assert worker["spec"]["terminationGracePeriodSeconds"] >= grace + 15
    assert grace > float(serve["ray_actor_options"]["runtime_env"]["env_vars"]["CALOTYPE_DRAIN_SECONDS"])


def test_containers_have_minimal_rights() -> None:
    """No container runs as root or can gain rights. Except for Ray, which writes logs, file systems are read-only."""
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


def test_selectors_match_pods() -> None:
    """Services, disruption budgets and policies match pods, and the bridge's upstream is a headless Service."""
    found = [each.values[0] for each in plain_documents()]
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


def test_ray_has_the_same_configuration_as_locally() -> None:
    """The configurations differ only in the size of a replica and the source of health checks."""
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


def test_two_of_the_largest_images_fit_into_the_memory_limit() -> None:
    """The memory limit covers the loaded model, retained images and two images of the largest size at once.

    The figures of the model are those in service/SIZING.md; `tests/unit/engine/devices/test_memory.py` measures them.
    """
    sizing = (ROOT / "service" / "SIZING.md").read_text()
    denoising, decoding = map(float, re.findall(r"one image at a time \| (\d+) · (\d+) bytes", sizing)[0])
    loaded = float(re.findall(r"just loaded · of a bridge \| ([\d.]+) GB", sizing)[0]) * 1e9
    replicas = documents(MANIFESTS / "base" / "replicas.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    given = {each["name"].removeprefix("CALOTYPE_").lower(): each["value"] for each in replicas["env"]}
    settings = Settings(**given)
    assert replicas["resources"]["limits"]["memory"] == "3Gi"
    free = 3 * 2**30 - loaded - settings.retain_bytes - 256 * 2**20
    two = [settings.max_pixels] * 2
    assert MemoryModel(0, (denoising, 0.0), (decoding, 0.0)).need(two) <= free
    actor = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    variables = actor["ray_actor_options"]["runtime_env"]["env_vars"]
    two = [int(variables["CALOTYPE_MAX_PIXELS"])] * 2
    assert MemoryModel(0, (denoising, 0.0), (decoding, 0.0)).need(two) <= int(variables["CALOTYPE_MEMORY_LIMIT"])


def test_every_variable_of_ray_replicas_is_a_valid_setting() -> None:
    """Replicas read their settings from the environment of the actor."""
    actor = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])["applications"][0]["deployments"][0]
    variables = actor["ray_actor_options"]["runtime_env"]["env_vars"]
    Settings(**{name.removeprefix("CALOTYPE_").lower(): value for name, value in variables.items()})
