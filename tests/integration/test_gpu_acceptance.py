"""The acceptance script for machines with GPUs, as far as a CPU goes; and the bookkeeping of the GPU benchmark."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
#: What machines with torch and transformers alone do not have.
ABSENT = ["ray", "vllm", "pydantic", "pyarrow", "datasets", "peft"]


def accept(part: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the script with tiny models; its process and its result. Python looks for modules in `folder`, too."""
    out = folder / "out.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_acceptance.py"), "--tiny", "--part", part, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    return done, json.loads(out.read_text(encoding="utf-8"))


def test_every_kernel_check_that_a_cpu_can_run_passes_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"  # importing one of them fails
    (tmp_path / "sitecustomize.py").write_text(blocked, encoding="utf-8")
    done, result = accept("kernels", tmp_path)
    assert done.returncode == 0 and result["failed"] == [], done.stdout + done.stderr
    checks = {check["name"]: check for check in result["checks"]}
    assert len(checks) >= 13 and all(check["passed"] and check["numbers"] for check in checks.values())
    assert {
        f"tree attention, heads of {size}, {kind}" for size in (64, 128, 256) for kind in ("float32", "bfloat16")
    } < (checks.keys())
    zero = checks["log-ratios at step 0, bfloat16"]["numbers"]
    assert zero["packed: largest log-ratio of a response, nats"] == {"value": 0.0, "at_most": 0.0}
    twice = checks["the same step twice, bfloat16"]["numbers"]
    assert twice["gradients that differ when the step is repeated, sums in order"] == {"value": 0, "at_most": 0}
    assert twice["seconds in order, over those as threads come"] > 0
    assert {"ours", "plain PyTorch"} == checks["benchmarks/gpu.py, plain PyTorch"]["numbers"]["sides"].keys()
    left_out = {each["name"]: each["why"] for each in result["left_out"]}
    assert "tests/integration/test_memory.py" in left_out["memory of a training step"]
    assert not left_out.keys() & checks.keys()
    for name in [*checks, *left_out]:  # one line each
        assert sum(f"  {name}" in line or f" {name}:" in line for line in done.stdout.splitlines()) == 1, name


@pytest.mark.long
@pytest.mark.timeout(1600)
def test_every_platform_check_that_a_cpu_can_run_passes(tmp_path: Path) -> None:
    done, result = accept("platform", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["name"] for check in result["checks"]] == [
        "engine, host sync, log-probs, float32",
        "engine, host sync, log-probs, bfloat16",
        "a PPO comparison",
        "a PPO comparison whose generation actor is killed",
    ]
    assert {"IPC sync", "sleep and wake", "batch-invariant engine, and its price"} < {
        each["name"] for each in result["left_out"]
    }


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports one of benchmarks/, which find each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


#: A part whose checks pass, find something wrong, raise, end their process, and take too long.
PART = """
    import os, sys, time
    from acceptance import Check

    def wrong(setting, outcome):
        outcome.at_most("gap", 2.0, 1.0)

    def crash(setting, outcome):
        raise ValueError("too\\nmany lines")

    CHECKS = [
        Check("fine", lambda setting, outcome: outcome.at_most("gap", 0.5, 1.0)),
        Check("wrong", wrong),
        Check("none", lambda setting, outcome: outcome.at_most("gap", float("nan"), 1.0)),
        Check("crash", crash),
        Check("abort", lambda setting, outcome: os.abort()),
        Check("late", lambda setting, outcome: time.sleep(60), limit_s=1.0),
        Check("absent", None, lambda setting: "there is no such thing"),
        Check("still fine", lambda setting, outcome: outcome.note("pid", os.getpid())),
    ]
    here = lambda setting: {"device": "none"}
    tidy = lambda: None
"""


def test_it_goes_on_after_checks_that_fail_crash_or_hang_and_writes_each(
    tmp_path: Path, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acceptance_broken.py").write_text(textwrap.dedent(PART), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result: dict[str, Any] = {"here": {}, "checks": [], "left_out": []}
    saved: list[int] = []
    setting = script("acceptance").Setting(True, str(tmp_path), 1)
    script("gpu_acceptance").run_part("broken", setting, result, lambda: saved.append(len(result["checks"])))
    found = {check["name"]: check for check in result["checks"]}
    assert {name for name, check in found.items() if check["passed"]} == {"fine", "still fine"}
    assert found["wrong"]["error"] == "gap is 2, and at most 1 is allowed"
    assert "gap is nan" in found["none"]["error"] and found["crash"]["error"] == "ValueError: too"
    assert "status -6" in found["abort"]["error"] and found["late"]["error"].startswith("it took longer than 1 s")
    assert [each["name"] for each in result["left_out"]] == ["absent"]
    assert saved == [1, 2, 3, 4, 5, 6, 6, 7]


def test_chosen_checks_are_done_again_and_earlier_results_of_others_are_kept(
    tmp_path: Path, script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acceptance_broken.py").write_text(textwrap.dedent(PART), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    earlier = [{"name": "wrong", "passed": True}, {"name": "fine", "passed": False}]
    result: dict[str, Any] = {"here": {}, "checks": earlier, "left_out": [{"name": "still fine", "why": "no time"}]}
    setting = script("acceptance").Setting(True, str(tmp_path), 1)
    script("gpu_acceptance").run_part("broken", setting, result, lambda: None, ["fine", "absent"])
    assert [(one["name"], one["passed"]) for one in result["checks"]] == [
        ("wrong", True), ("fine", True), ("still fine", True)
    ]  # fmt: skip
    assert [one["name"] for one in result["left_out"]] == ["absent"]


def test_a_part_that_cannot_be_imported_is_a_failed_check(tmp_path: Path, script: Callable[[str], Any]) -> None:
    result: dict[str, Any] = {"here": {}, "checks": [], "left_out": []}
    setting = script("acceptance").Setting(True, str(tmp_path), 1)
    script("gpu_acceptance").run_part("absent", setting, result, lambda: None)
    (found,) = result["checks"]
    assert not found["passed"] and found["error"] == "ModuleNotFoundError: No module named 'acceptance_absent'"


#: Sides that answer at once, and one whose memory runs out in its first block.
SIDE = """
    import json, sys
    {before}
    for line in sys.stdin:
        found = {{"losses": [0.6931471805599453], "norms": [1.0], "seconds": 0.1, "peak_mib": 1.0}}
        print("RESULT " + json.dumps(found), flush=True)
"""
OUT_OF_MEMORY = 'import torch; raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")'


def test_a_side_whose_memory_runs_out_is_a_result_and_the_others_are_timed(
    tmp_path: Path, script: Callable[[str], Any]
) -> None:
    gpu, sides = script("gpu"), {}
    before = {"plain PyTorch": OUT_OF_MEMORY, "broken": "raise KeyError('x')", "ours": ""}
    for number, (title, line) in enumerate(before.items()):
        path = tmp_path / f"side{number}.py"
        path.write_text(textwrap.dedent(SIDE.format(before=line)), encoding="utf-8")
        sides[title] = gpu.Contender(str(path), True)
    shape = gpu.SHAPES["tiny"]
    spec = gpu.write_spec(shape, "cpu", 1, 2, tmp_path)
    result: dict[str, Any] = {"peak_tflops": None}
    saved: list[list[str]] = []
    fine = gpu.compare(sides, spec, shape, tmp_path, 1, result, lambda: saved.append(list(result.get("sides", {}))))
    ran_out = {"out_of_memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB."}
    assert result["parity"]["ended"] == {"plain PyTorch": ran_out, "broken": {"error": "KeyError: 'x'"}}
    assert result["sides"]["plain PyTorch"] == ran_out and result["sides"]["broken"] == {"error": "KeyError: 'x'"}
    assert result["sides"]["ours"]["seconds_per_step"] == 0.1
    assert not fine  # an error is wrong, memory that runs out is not
    assert saved == [list(sides)[:number] for number in range(4)]


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_cards_form(script: Callable[[str], Any], card: str, peak: float | None) -> None:
    assert script("gpu").peak_tflops(card) == peak


def test_a_batch_in_passes_has_the_loss_and_gradients_of_one(script: Callable[[str], Any]) -> None:
    gpu, plain, random = script("gpu"), script("step_plain"), script("random_pairs")
    pairs = random.random_pairs(random.hh_lengths(4, seed=0) // 8 + 1, 1024, seed=1)
    spec = {"device": "cpu", "bf16": False, "beta": 0.1, "batch_size": 4, "pad": 0, "max_grad_norm": 1.0}
    reference, found = gpu.SHAPES["tiny"].new(1), []
    for size in (4, 2):
        policy = gpu.SHAPES["tiny"].new(0)
        passes = [pairs[at : at + size] for at in range(0, 4, size)]
        found.append(plain.step(policy, reference, torch.optim.SGD(policy.parameters()), passes, spec))
    for one, two in zip(*found, strict=True):
        assert float(one) == pytest.approx(float(two), rel=1e-5)


def test_passes_that_do_not_divide_a_batch_are_refused(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--tiny", "--batch-size", "16", "--plain-micro-batch", "3"])
    with pytest.raises(SystemExit):
        script("gpu").read_arguments()
    assert "--plain-micro-batch 3 does not divide a batch of 16 pairs" in capsys.readouterr().err
