"""Configuration: every mistake is one sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prefarena.config import DPO, Comparison, dump_config, load_config, parse_config
from prefarena.errors import UserError


def test_the_default_loads_and_its_dump_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config()
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_overrides_reach_entries_by_name() -> None:
    config = load_config(None, ["entries.dpo.method.beta=0.3", "seeds=[4, 5]", "task.num_prompts=8"])
    method = {entry.name: entry.method for entry in config.entries}["dpo"]
    assert isinstance(method, DPO) and method.beta == 0.3
    assert config.seeds == (4, 5) and config.task.kind == "language" and config.task.num_prompts == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks.seed=1", "unknown key 'tasks'; did you mean 'task'?"),
        ("task.sed=1", "unknown key 'task.sed'; did you mean 'seed'?"),
        ("entries.dpo.method.betta=1", "did you mean 'beta'?"),
        ("entries.mpo.method.training.learning_rat=1", "did you mean 'learning_rate'?"),
        ("entries.dpo.method.kind=dopo", "entries.2.method"),
        ("task.num_letters=fourteen", "task.num_letters: "),
        ("task.num_letters=14", "less than or equal to 13 (got 14)"),
        ("entries.nobody.method.beta=1", "no entry 'nobody'; there are sft, mpo"),
        ("entries.dpo.name=mpo", "entry name 'mpo' is used twice"),
        ("seeds=[1, 1]", "a seed twice"),
        ("model.hidden_size=65", "not a multiple of num_heads"),
        ("seeds", "expected key.path=value"),
        ("name.x=1", "is a value, not a group of settings"),
    ],
)
def test_mistakes_are_named(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    assert says in str(caught.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="a config is a mapping"):
        load_config(broken)
    with pytest.raises(UserError, match="'entries' is required"):
        parse_config({"name": "x"})


def test_every_shipped_config_loads() -> None:
    configs = sorted((Path(__file__).parents[1] / "pipelines" / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        assert isinstance(load_config(path), Comparison), path
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["generation.weight_sync=nccl"], "weight_sync: nccl needs resources.use_gpu"),
        (
            ["generation.weight_sync=ipc", "resources.use_gpu=true"],
            "lower resources.gpus_per_worker (1) and generation.gpus (1) to at most 1 together",
        ),
        (
            ["generation.weight_sync=ipc", "resources.use_gpu=true", "generation.num_actors=2"],
            "one worker and one actor on the same GPU",
        ),
    ],
)
def test_a_weight_sync_that_cannot_work_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert says in str(caught.value)
