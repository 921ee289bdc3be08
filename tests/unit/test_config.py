"""Configuration: every mistake is one sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prefarena.config import DPO, Comparison, dump_config, load_config, parse_config
from prefarena.config.labels import kept_apart
from prefarena.errors import UserError

ON_ONE_GPU = ["resources.use_gpu=true", "resources.gpus_per_worker=0.5", "generation.gpus=0.5"]
APART = ["resources.labels={role: train}", "generation.labels={role: generate}"]


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
        ("entries.dpo.method.lr=1", "unknown key 'entries.2.method.lr'; did you mean 'training.learning_rate'?"),
        ("entries.rlhf.method.num_minibatches=4", "did you mean 'training.num_minibatches'?"),
        ("use_gpu=true", "did you mean 'resources.use_gpu'?"),
        ("entries.dpo.method.training.lr=1", "did you mean 'learning_rate'?"),
        ("entries.dpo.method.training.epochs=1", "did you mean 'num_epochs'?"),
        ("entries.rlhf.method.training.gamma=1", "did you mean 'discount'?"),
        ("entries.mpo.method.gamma=1", "did you mean 'pretraining_weight'?"),
        ("entries.dpo.method={kind: simpo, gamma: 1}", "did you mean 'margin'?"),
        ("entries.dpo.method={kind: orpo, beta: 1}", "did you mean 'odds_weight'?"),
        ("entries.dpo.method={kind: robust_dpo, label_smoothing: 0.1}", "did you mean 'flip_rate'?"),
        ("entries.dpo.method.kind=slic", "did you mean 'hinge'?"),
        ("entries.dpo.method.training.lora={r: 8}", "did you mean 'rank'?"),
        ("entries.rlhf.method.reward.training.lora={rnak: 8}", "did you mean 'rank'?"),
        ("model={kind: pretrained, model_name_or_path: x}", "did you mean 'path'?"),
        ("task={kind: text, dataset_name: x}", "did you mean 'data'?"),
        (
            "entries.dpo.method.training.precision=bf16",
            "is not one of float32, tf32, bfloat16; did you mean 'bfloat16'?",
        ),
        ("entries.rlhf.method.kind=ppo", "did you mean 'rlhf'?"),
        ("entries.dpo.method.kind=dop", "did you mean 'dpo'?"),
        ("entries.rlhf.method.training.schedule=constant_with_warmup", "did you mean 'constant'?"),
        ("resources.sharding=fsdp2", "did you mean 'fsdp'?"),
        ("name=007", "put it in quotes (got 7)"),
        ("output=yes", "reads what is written here as a truth value; put it in quotes"),
        ("seeds=0", "seeds: a list is wanted; write [0]"),
        ("entries.dpo.method.training.num_steps=1e3", "write 1000"),
        ("entries.dpo.method.beta=.inf", "entries.2.method.beta: input should be a finite number"),
        ("entries.dpo.method.beta=.nan", "finite number"),
        ("entries.mpo.method.demonstration_weight=.inf", "finite number"),
        ("entries.rlhf.method.training.learning_rate=.inf", "finite number"),
        ("entries.dpo.method.training.num_epochs=1e999", "finite number"),
        ("generation.sync_timeout_s=.inf", "finite number"),
        ("entries.dpo.method.training.betas=[0.9, 1.5]", "less than 1"),
        ("entries.rlhf.method.training.betas=[-0.1, 0.9]", "greater than or equal to 0"),
        ("entries.dpo.method.training.betas=[yes, 0.9]", "training.betas: a number is wanted"),
        ("entries.dpo.method.beta=yes", "entries.2.method.beta: a number is wanted; YAML reads yes"),
        ("entries.dpo.method.training.batch_size=on", "training.batch_size: a number is wanted"),
        ("seeds=[true]", "seeds: a number is wanted"),
        ("task.seed=true", "task.seed: a number is wanted"),
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
    twice = "name: x\nentries:\n  - name: dpo\n    method: {kind: dpo, beta: 0.1, beta: 0.2}\n"
    broken.write_text(twice, encoding="utf-8")
    with pytest.raises(UserError, match=r"broken.yaml: key 'beta' is written twice, on lines 4 and 4; remove one"):
        load_config(broken)
    broken.write_text("name: x\nseeds: [0]\nname: y\n", encoding="utf-8")
    with pytest.raises(UserError, match="key 'name' is written twice, on lines 1 and 3"):
        load_config(broken)
    broken.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="a config must be a mapping"):
        load_config(broken)
    with pytest.raises(UserError, match="'entries' is required"):
        parse_config({"name": "x"})


def test_every_shipped_config_loads() -> None:
    configs = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        assert isinstance(load_config(path), Comparison), path
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["generation.weight_sync=nccl"], "weight_sync: nccl needs resources.use_gpu"),
        (["generation.batch_invariant=true"], "batch_invariant is for engines on GPUs; it needs resources.use_gpu"),
        (
            ["generation.weight_sync=ipc", "resources.use_gpu=true"],
            "lower resources.gpus_per_worker (1) and generation.gpus (1) to at most 1 together",
        ),
        (
            ["generation.weight_sync=ipc", "resources.use_gpu=true", "generation.num_actors=2"],
            "one worker and one actor on the same GPU",
        ),
        (
            [*ON_ONE_GPU, "generation.weight_sync=ipc", *APART],
            "no node meets both resources.labels and generation.labels",
        ),
        (
            ["generation.weight_sync=ipc", "resources.use_gpu=true", "generation.tensor_parallel=2"],
            "ipc is for an engine on the trainer's own GPU; use nccl or host with generation.tensor_parallel: 2",
        ),
        (
            [*ON_ONE_GPU, "generation.tensor_parallel=2"],
            "tensor_parallel: 2 takes whole GPUs, which its ranks join over NCCL; set generation.gpus (0.5) to 1",
        ),
        (
            [*ON_ONE_GPU, "generation.weight_sync=nccl"],
            "raise resources.gpus_per_worker (0.5) and generation.gpus (0.5) to more than 1 together",
        ),
        (
            [*ON_ONE_GPU, "generation.weight_sync=nccl", *APART, "generation.num_actors=2"],
            "each of generation.num_actors: 2 on a GPU of its own; set generation.gpus (0.5) above 0.5",
        ),
        (
            [*ON_ONE_GPU, "resources.num_workers=2"],
            "gpus_per_worker: 0.5 puts several of resources.num_workers: 2 on one GPU",
        ),
        (
            [*ON_ONE_GPU, "resources.num_workers=2", "resources.sharding=fsdp", *APART],
            "set it above 0.5, or num_workers to 1",
        ),
    ],
)
def test_processes_that_cannot_talk_on_the_gpus_they_would_get_are_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*ON_ONE_GPU, "generation.weight_sync=ipc"],
        [*ON_ONE_GPU, "generation.weight_sync=host", "generation.num_actors=2"],
        [*ON_ONE_GPU, "generation.weight_sync=nccl", *APART],
        ["resources.use_gpu=true", "generation.weight_sync=nccl", "resources.num_workers=2", "generation.num_actors=2"],
        ["resources.use_gpu=true", "generation.weight_sync=nccl", "resources.gpus_per_worker=0.6"],
        ["resources.use_gpu=true", "generation.weight_sync=nccl", "generation.tensor_parallel=4"],
        ["generation.tensor_parallel=2"],
        ["resources.num_workers=2", "resources.gpus_per_worker=0.5"],  # without GPUs it asks for nothing
    ],
)
def test_processes_that_can_are_not(overrides: list[str]) -> None:
    load_config(None, overrides)


@pytest.mark.parametrize(
    ("some", "others", "apart"),
    [
        ({}, {"role": "train"}, False),
        ({"role": "train"}, {"role": "train"}, False),
        ({"role": "train"}, {"role": "generate"}, True),
        ({"role": "train"}, {"zone": "x"}, False),
        ({"role": "train"}, {"role": "!train"}, True),
        ({"role": "!train"}, {"role": "in(train, generate)"}, False),
        ({"role": "!in(train,generate)"}, {"role": "in(train, generate)"}, True),
        ({"role": "in(train,generate)"}, {"role": "in(generate, score)"}, False),
        ({"role": "!train"}, {"role": "!generate"}, False),
        ({"role": "train", "zone": "x"}, {"role": "train", "zone": "y"}, True),
    ],
)
def test_labels_that_no_node_meets_together(some: dict[str, str], others: dict[str, str], apart: bool) -> None:
    pairs = tuple(some.items()), tuple(others.items())
    assert kept_apart(*pairs) == kept_apart(*reversed(pairs)) == apart
