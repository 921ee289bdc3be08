"""Models from elsewhere: no pickles are read, and no code of theirs is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefarena.errors import UserError
from prefarena.modeling.load import load_policy, load_reward_model, load_tokenizer

SIZES = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))  # type: ignore[arg-type]
    model.config.save_pretrained(str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for load in (load_policy, load_reward_model):
        with pytest.raises(UserError, match="safetensors"):
            load(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "it-ran"
    names = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"}
    config = {"model_type": "of-its-own", "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "code.py").write_text(f"open({str(trace)!r}, 'w').close()", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers can ask on a terminal
    for load in (load_policy, load_tokenizer):
        with pytest.raises(UserError, match=str(tmp_path)):
            load(str(tmp_path))
    assert not trace.exists()
