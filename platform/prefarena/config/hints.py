"""What somebody who writes an unknown word probably means: other trainers' names for our keys, and near spellings."""

from __future__ import annotations

import difflib
from collections.abc import Collection

#: Other trainers' names of settings (TRL, transformers, verl, OpenRLHF, papers) and ours, the likeliest first.
_KEYS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "critic_lr": ("critic_learning_rate",),
    "bs": ("batch_size", "rollouts_per_iteration"),
    "train_batch_size": ("batch_size", "rollouts_per_iteration"),
    "per_device_train_batch_size": ("micro_batch_tokens", "micro_batch_size"),
    "gradient_accumulation_steps": ("micro_batch_tokens", "micro_batch_size"),
    "epochs": ("num_epochs",),
    "num_train_epochs": ("num_epochs",),
    "ppo_epochs": ("num_epochs",),
    "steps": ("num_steps", "num_iterations"),
    "max_steps": ("num_steps", "num_iterations"),
    "iterations": ("num_iterations",),
    "lr_scheduler_type": ("schedule",),
    "scheduler": ("schedule",),
    "warmup_ratio": ("warmup_steps", "warmup_iterations"),
    "bf16": ("precision", "dtype"),
    "gradient_checkpointing": ("activation_checkpointing",),
    "clip_range": ("clip",),
    "cliprange": ("clip",),
    "vf_clip": ("value_clip",),
    "gamma": ("margin", "pretraining_weight", "discount"),
    "simpo_gamma": ("margin",),
    "delta": ("margin",),
    "cpo_alpha": ("likelihood_weight",),
    "discopop_tau": ("temperature",),
    "eta": ("demonstration_weight",),
    "lambda": ("gae_lambda",),
    "lam": ("gae_lambda",),
    "kl": ("kl_coef",),
    "init_kl_coef": ("kl_coef",),
    "beta": ("kl_coef", "tau", "odds_weight"),
    "num_generations": ("group_size",),
    "ref_model_sync_steps": ("reference_every",),
    "ref_model_mixup_alpha": ("reference_mix",),
    "sync_ref_model": ("reference_every",),
    "label_smooth": ("label_smoothing",),
    "label_smoothing": ("flip_rate",),
    "peft": ("lora",),
    "r": ("rank",),
    "lora_r": ("rank",),
    "lora_alpha": ("alpha",),
    "target_modules": ("targets",),
    "model_name": ("path",),
    "model_name_or_path": ("path",),
    "name_or_path": ("path",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "dataset_path": ("data",),
    "test_size": ("num_test_pairs",),
    "eval_size": ("num_test_pairs",),
    "max_prompt_length": ("max_prompt_tokens",),
    "max_completion_length": ("max_response_tokens",),
    "max_new_tokens": ("max_response_tokens",),
    "max_length": ("max_response_tokens", "max_prompt_tokens"),
    "methods": ("entries",),
    "seed": ("seeds",),
    "output_dir": ("output",),
    "reward_model": ("reward",),
    "gpus": ("use_gpu",),
    "num_gpus": ("num_workers",),
    "fsdp": ("sharding",),
    "tensor_parallel_size": ("tensor_parallel",),
    "trackers": ("tracking",),
    "tracker": ("tracking",),
    "report_to": ("tracking",),
    "logging": ("tracking",),
    "log_dir": ("folder",),
    "logdir": ("folder",),
    "logging_dir": ("folder",),
    "dir": ("folder",),
    "tracking_uri": ("uri",),
    "url": ("uri",),
    "experiment_name": ("experiment",),
    "project_name": ("project",),
    "team": ("entity",),
}
#: The same for values.
_VALUES: dict[str, tuple[str, ...]] = {
    "bf16": ("bfloat16",),
    "fp32": ("float32",),
    "float": ("float32",),
    "fp16": ("bfloat16",),
    "float16": ("bfloat16",),
    "ppo": ("rlhf",),
    "reinforce": ("reinforce_pp",),
    "reinforce++": ("reinforce_pp",),
    "reinforce_plus_plus": ("reinforce_pp",),
    "reinforce_baseline": ("reinforce_pp",),
    "bon": ("best_of_n",),
    "slic": ("hinge",),
    "robust": ("robust_dpo",),
    "exo": ("exo_pair",),
    "nca": ("nca_pair",),
    "sppo": ("sppo_hard",),
    "apo": ("apo_zero",),
    "cdpo": ("dpo",),
    "best-of-n": ("best_of_n",),
    "reward_model": ("learned",),
    "hf": ("pretrained",),
    "huggingface": ("pretrained",),
    "openai": ("endpoint",),
    "llm": ("endpoint",),
    "python": ("function",),
    "sync": ("synchronous",),
    "async": ("asynchronous",),
    "fsdp2": ("fsdp",),
    "ddp": ("none",),
    "constant_with_warmup": ("constant",),
    "tb": ("tensorboard",),
    "weights_and_biases": ("wandb",),
}


def key_meant(written: str, known: Collection[str]) -> str | None:
    """The known key that somebody who wrote an unknown one most likely means; None where none is near."""
    return _meant(written, known, _KEYS)


def value_meant(written: str, known: Collection[str]) -> str | None:
    """The same for one of a setting's possible values."""
    return _meant(written, known, _VALUES)


def _meant(written: str, known: Collection[str], other_names: dict[str, tuple[str, ...]]) -> str | None:
    for name in other_names.get(written.lower(), ()):
        if name in known:
            return name
    return next(iter(difflib.get_close_matches(written.lower(), sorted(known), n=1)), None)
