"""The launch files of `dmpo serve`: the RayService by KubeRay's and Ray Serve's own schemas, the compose service."""

import importlib
import os
from pathlib import Path

import pytest
import yaml
from test_documents import check
from test_submit import closed, plant, pod_faults, ray_job_faults

from dmpo_dist.config import load_config

ROOT = Path(__file__).parents[1]
SERVICE = yaml.safe_load((ROOT / "launch/serving/rayservice.yaml").read_text(encoding="utf-8"))
WORKER = "spec.rayClusterConfig.workerGroupSpecs.0"


@pytest.fixture(scope="module")
def ray_service_schema():
    """KubeRay's own where the folder has it; else its RayCluster's, below the two keys of a RayService that we use."""
    folder = os.environ.get("DMPO_KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("DMPO_KUBERAY_SCHEMAS names no folder with KubeRay's CRDs (ray-project/kuberay, config/crd/bases)")
    found = {path.stem.removeprefix("ray.io_"): path for path in Path(folder).glob("*ray*.yaml")}
    path = found.get("rayservices", found["rayclusters"])
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(path.read_text(), Loader=loader)["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    if "rayservices" not in found:
        spec = {"serveConfigV2": {"type": "string"}, "rayClusterConfig": schema["properties"]["spec"]}
        schema["properties"]["spec"] = {"type": "object", "properties": spec, "required": list(spec)}
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return closed({**schema, "additionalProperties": False})


def test_the_manifest_is_what_kuberay_and_kubernetes_take(ray_service_schema):
    assert ray_job_faults(ray_service_schema, SERVICE) == []
    for path, value in (
        ("spec.serveConfig", ""),
        ("spec.rayClusterConfig.enableAutoscaling", True),
        (f"{WORKER}.replica", 2),
        (f"{WORKER}.rayStartParams.num-cpus", 8),
    ):
        assert ray_job_faults(ray_service_schema, plant(SERVICE, path, value)), path
    cluster = SERVICE["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        assert pod_faults(pod) == []
        assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_the_manifest_runs_our_application_by_a_configuration_that_ray_serve_takes():
    schema = pytest.importorskip("ray.serve.schema", reason="extra [serve]")
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, _, function = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    serve = importlib.import_module("dmpo_dist.cluster.serve")
    assert {deployment.name for deployment in application.deployments} == {"Front", serve.MODEL}
    assert application.name == serve.APPLICATION
    settings = load_config([], application.args["settings"])
    assert settings.serving.host == "0.0.0.0"
    [model] = [one for one in application.deployments if one.name == serve.MODEL]
    assert model.ray_actor_options.num_cpus == settings.cluster.cpus_per_worker
    worker = SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert float(worker["resources"]["limits"]["cpu"]) >= model.ray_actor_options.num_cpus + 0.5  # a Front beside it


def test_the_compose_service_runs_a_command_that_parses():
    services = yaml.safe_load((ROOT / "docker/compose.serve.yaml").read_text(encoding="utf-8"))["services"]
    [service] = services.values()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    words = [word.replace("${", "").replace(":-", "").replace("}", "") for word in service["command"]]
    check(" ".join(words), whole=True)
