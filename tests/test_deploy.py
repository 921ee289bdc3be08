"""What brings a cluster up, checked without one: by Ray's launcher, KubeRay's schema, and the project's own pins."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from prefarena import __version__
from prefarena.config import Comparison, parse_config

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT.parent / "shared" / "schemas" / "kuberay-rayjobs-crd.yaml"
CLUSTERS = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on-premises.yaml"]
PLACED = [*CLUSTERS, "deploy/rayjob.yaml"]
_IMAGE = re.compile(r"REGISTRY/prefarena:(\S+)")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def manifests() -> dict[str, Any]:
    text = (ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def pins() -> dict[str, str]:
    """Exact versions that the project asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    found = (re.fullmatch(r"([\w-]+)(?:\[.*\])?==([\w.]+)", requirement) for requirement in asked)
    return {match[1]: match[2] for match in found if match}


# -------------------------------------------------------------------------------------- Ray's launcher


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_launcher_accepts(name: str) -> None:
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["docker"]["container_name"] == "prefarena"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree.update(max_worker=3),
        lambda tree: tree["available_node_types"]["train"].update(label={"role": "train"}),
        lambda tree: tree.update(head_node_type="haed"),
        lambda tree: tree["docker"].pop("container_name"),
    ],
    ids=["unknown key", "unknown key of a node", "no such head", "no container name"],
)
def test_the_launcher_refuses_what_is_misspelt(spoil: Any) -> None:
    tree = read("cluster.yaml")
    spoil(tree)
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        validate_config(prepare_config(tree))


@pytest.mark.parametrize("name", CLUSTERS[:2])
def test_node_types_are_labelled_and_all_but_the_head_come_on_demand_from_spot(name: str) -> None:
    tree = read(name)
    types = tree["available_node_types"]
    assert {kind: settings["labels"] for kind, settings in types.items()} == {
        kind: {"role": kind} for kind in ("head", "train", "generate")
    }
    assert tree["head_node_type"] == "head" and "spot" not in str(types["head"]).lower()
    for kind in ("train", "generate"):
        assert types[kind]["min_workers"] == 0 < types[kind]["max_workers"] and types[kind]["resources"]["GPU"] == 1
        assert "spot" in str(types[kind]["node_config"]).lower()
    assert sum(types[kind]["max_workers"] for kind in ("train", "generate")) == tree["max_workers"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_dashboard_listens_on_loopback_and_the_token_comes_from_a_file(name: str) -> None:
    tree = read(name)
    start = tree["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in str(tree)
    assert tree["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "RAY_AUTH_MODE=token" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------- KubeRay


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema in which keys that it does not name are errors, as the API server would prune them."""
    schema = copy.deepcopy(schema)
    stack: list[Any] = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            open_ended = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
            if "properties" in node and not open_ended:
                node["additionalProperties"] = False
            if node.get("x-kubernetes-int-or-string"):
                node.pop("type", None)
            stack += list(node.values())
        elif isinstance(node, list):
            stack += node
    return schema


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    if not SCHEMA.exists():
        pytest.skip(f"KubeRay's schema of RayJob is not at {SCHEMA}")
    versions = yaml.load(SCHEMA.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))[
        "spec"
    ]["versions"]
    found = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    found["properties"]["metadata"] = {"type": "object", "properties": {"name": {"type": "string"}}}
    return jsonschema.Draft7Validator(closed(found))


def test_the_rayjob_is_valid(schema: jsonschema.Draft7Validator) -> None:
    assert [error.message for error in schema.iter_errors(manifests()["RayJob"])] == []


@pytest.mark.parametrize("path", ["entrypiont", "rayClusterSpec.authOption", "rayClusterSpec.headGroupSpec.label"])
def test_a_misspelt_rayjob_is_not(schema: jsonschema.Draft7Validator, path: str) -> None:
    job = copy.deepcopy(manifests()["RayJob"])
    *parents, last = path.split(".")
    node = job["spec"]
    for part in parents:
        node = node[part]
    node[last] = {}
    (error,) = schema.iter_errors(job)
    assert last in error.message


def test_the_rayjob_asks_for_a_token_and_no_privileges() -> None:
    cluster = manifests()["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def test_the_comparison_in_the_manifest_fits_its_groups() -> None:
    found = manifests()
    text = found["ConfigMap"]["data"]["comparison.yaml"]
    config: Comparison = parse_config(yaml.safe_load(text))
    groups = {
        tuple(group["labels"].items()): group for group in found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    assert config.resources.num_workers <= groups[config.resources.labels]["maxReplicas"]
    assert config.generation.num_actors <= groups[config.generation.labels]["maxReplicas"]
    assert config.output.startswith("/shared/") and config.resources.autoscaled
    assert found["RayJob"]["spec"]["entrypoint"].endswith("/comparison.yaml")


# -------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("name", [*PLACED, "Dockerfile"])
def test_images_are_named_by_the_versions_that_the_project_pins(name: str) -> None:
    tags = set(_IMAGE.findall((ROOT / name).read_text(encoding="utf-8")))
    of = pins()
    assert tags == {f"{__version__}-ray{of['ray']}-vllm{of['vllm']}-torch{of['torch']}"}


def test_the_image_is_built_from_exact_versions() -> None:
    of, text = pins(), (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"FROM vllm/vllm-openai:v{of['vllm']}\n" in text
    assert f"('{of['ray']}', '{of['torch']}', '{of['vllm']}')" in text
    assert "\nUSER ray\n" in text and ":latest" not in text
    lines = (ROOT / "requirements" / "cluster.txt").read_text(encoding="utf-8").splitlines()
    asked = [re.fullmatch(r"([\w-]+)(?:\[.*\])?==([\w.]+)", line) for line in lines if line[0] != "#"]
    assert all(asked) and of.items() <= {match[1]: match[2] for match in asked if match}.items()
    assert manifests()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == of["ray"]
