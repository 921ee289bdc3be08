"""Models as people have them: whole ones load without a word, damaged ones are refused with one sentence that says why.

A sentence names the folder or the file, fits one line, and comes from the headers alone where these show the fault.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pipelines.checks import check_input
from pipelines.memory import model_settings
from prefarena.config import ClassifierJudge, Comparison, PretrainedModel, TextTask, parse_config
from prefarena.data.preparation import COLUMNS, TEXT_COLUMNS, prepare_pairs, prepare_pieces
from prefarena.data.rejections import NO_ROW, REMEDIES
from prefarena.data.sources import find_parts, read_chunks
from prefarena.data.splits import NONE_HELD_OUT
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.judges.classifier import ClassifierScorer, check_classifier
from prefarena.modeling.checks import check_causal
from prefarena.modeling.inspection import (
    check_context,
    check_head_size,
    check_split,
    inspect_classifier,
    inspect_policy,
)
from prefarena.modeling.load import (
    base_model,
    load_checked,
    load_policy,
    load_reward_model,
    load_tokenizer,
    save_policy,
)
from prefarena.modeling.vocabulary import check_tokens
from tests.helpers.models import FAMILIES, SCORED, random_model, save_model
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer

Change = Callable[[Path], object]
TensorChange = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
#: One for every way in which names and heads are laid out.
LAYOUTS = ["llama", "qwen2-tied", "gpt2", "gpt-neox", "gemma2", "phi3", "opt", "mixtral"]


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny models, made once; the tests change copies."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str, task: str = "ForCausalLM", sharded: bool = False) -> Path:
        path = root / f"{family}-{task}-{sharded}"
        if not path.exists():
            changed = {"num_labels": 1} if task == "ForSequenceClassification" else {}
            save_model(path, random_model(family, task, **changed), **({"max_shard_size": "20KB"} if sharded else {}))
        return path

    return folder


@pytest.fixture
def made(tmp_path: Path, kept: Callable[..., Path]) -> Callable[..., Path]:
    """A copy that can be damaged."""

    def folder(family: str = "llama", task: str = "ForCausalLM", sharded: bool = False) -> Path:
        return Path(shutil.copytree(kept(family, task, sharded), tmp_path / "model"))

    return folder


def refused(what: Callable[[], Any], *words: str) -> str:
    """The one sentence with which it is refused, which has all of `words`."""
    with pytest.raises(UserError) as caught:
        what()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def refused_twice(folder: Path, *words: str) -> None:
    """From the headers alone, and when the weights are loaded."""
    refused(lambda: inspect_policy(str(folder)), *words)
    refused(lambda: load_policy(folder), *words)


def check(folder: Path, **keywords: Any) -> None:
    """What is looked at before Ray starts."""
    settings = inspect_policy(str(folder), **keywords)
    check_tokens(str(folder), load_tokenizer(folder), settings)


def change_tensors(folder: Path, change: TensorChange) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def change_json(file: Path, **changed: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content.update(changed)
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}), encoding="utf-8")


# ----------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_loads_without_complaint(
    kept: Callable[..., Path], family: str, sharded: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = kept(family, sharded=sharded)
    assert len(list(folder.glob("*.safetensors"))) > 1 if sharded else (folder / "model.safetensors").exists()
    capfd.readouterr()
    check(folder, scored=family in SCORED)
    model = base_model(PretrainedModel(path=str(folder)), 16)
    assert "".join(capfd.readouterr()) == ""
    with torch.no_grad():
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, random_model(family)(ids).logits)


@pytest.mark.parametrize("family", SCORED)
def test_a_whole_classifier_loads_without_complaint(kept: Callable[..., Path], family: str) -> None:
    folder = str(kept(family, "ForSequenceClassification"))
    inspect_classifier(folder)
    load_reward_model(folder)
    scorer = ClassifierScorer(ClassifierJudge(path=folder), folder)
    assert scorer.score([[1, 3]], [[4, 2]]).shape == (1,)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DebertaV2", "DistilBert", "ModernBert", "Electra"])
def test_a_whole_encoder_is_a_judge(tmp_path: Path, name: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    settings = {"vocab_size": 16, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 1, **sizes}
    if name == "DistilBert":
        settings = {"vocab_size": 16, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 96, "num_labels": 1}
    model = getattr(transformers, f"{name}ForSequenceClassification")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    folder = save_model(tmp_path / "model", model)
    scorer = ClassifierScorer(ClassifierJudge(path=folder), folder)
    assert scorer.score([[1, 3]], [[4, 2]]).shape == (1,)


def test_a_judge_that_still_carries_a_language_models_head_is_no_fault(made: Callable[..., Path]) -> None:
    folder = made("llama", "ForSequenceClassification")
    change_tensors(folder, lambda tensors: {**tensors, "lm_head.weight": torch.ones(16, 64)})
    inspect_classifier(str(folder))
    load_reward_model(folder)


def test_buffers_of_older_releases_are_no_fault(made: Callable[..., Path]) -> None:
    folder = made("gpt2")
    mask = torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)
    change_tensors(
        folder,
        lambda tensors: {
            **tensors,
            **{f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)},
            **{f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)},
        },
    )
    check(folder)
    base_model(PretrainedModel(path=str(folder)), 16)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_saved_rotary_frequencies_and_masks_are_no_fault(made: Callable[..., Path], family: str) -> None:
    folder = made(family)
    stem = "model.layers.{}.self_attn" if family == "llama" else "gpt_neox.layers.{}.attention"
    mask = torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64)
    added = {f"{stem.format(i)}.rotary_emb.inv_freq": torch.ones(16) for i in range(2)}
    if family == "gpt-neox":
        added |= {f"{stem.format(i)}.bias": mask.clone() for i in range(2)}
        added |= {f"{stem.format(i)}.masked_bias": torch.tensor(-1e9) for i in range(2)}
    change_tensors(folder, lambda tensors: {**tensors, **added})
    check(folder)
    base_model(PretrainedModel(path=str(folder)), 16)


def test_a_body_with_a_tied_head_is_a_whole_language_model(tmp_path: Path) -> None:
    model = random_model("gpt2")
    save_model(tmp_path / "model", model.base_model)
    check(tmp_path / "model")
    ids = torch.arange(8)[None]
    assert torch.equal(load_policy(tmp_path / "model")(ids).logits, model(ids).logits)


def test_a_tied_head_that_is_saved_beside_the_embedding_is_no_fault(made: Callable[..., Path]) -> None:
    folder = made("llama-tied")
    name = "model.embed_tokens.weight"
    change_tensors(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[name].clone()})
    check(folder)
    load_policy(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_fault(tmp_path: Path, dtype: torch.dtype) -> None:
    half: PreTrainedModel = random_model("llama")
    torch.nn.Module.to(half, dtype)
    folder = Path(save_model(tmp_path / "model", half))
    check(folder)
    assert load_policy(folder).dtype == torch.float32


# ----------------------------------------------------------------------------- weights that are not the model's


def without_a_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".1." not in name}


def without_one_tensor(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    last = max(name for name in tensors if ".1." in name)
    return {name: tensor for name, tensor in tensors.items() if name != last}


def with_one_more_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    more = {name.replace(".1.", ".2."): tensor.clone() for name, tensor in tensors.items() if ".1." in name}
    return {**tensors, **more}


def with_a_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"policy.module.{name}": tensor for name, tensor in tensors.items()}


def with_unmerged_adapters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in tensors if ".1." in name and tensors[name].ndim == 2).removesuffix(".weight")
    return {**tensors, f"{name}.lora_A.default.weight": torch.ones(2, 64)}


def with_another_width(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = max(name for name in tensors if ".1." in name and tensors[name].ndim == 2)
    return {**tensors, name: torch.ones(3, 5)}


FAULTS: dict[TensorChange, str] = {
    without_a_layer: "missing",
    without_one_tensor: "missing",
    with_one_more_layer: "not in that model",
    with_a_prefix: "another prefix",
    with_unmerged_adapters: "merge_and_unload",
    with_another_width: "3 x 5",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("family", LAYOUTS)
def test_weights_of_another_model_are_refused_before_and_at_loading(
    made: Callable[..., Path], family: str, fault: TensorChange
) -> None:
    folder = made(family)
    change_tensors(folder, fault)
    refused_twice(folder, str(folder), FAULTS[fault])


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gpt-neox", "phi3", "mixtral"])
def test_a_folder_without_its_head_is_refused(tmp_path: Path, family: str) -> None:
    folder = Path(save_model(tmp_path / "model", random_model(family).base_model))
    refused_twice(folder, "1 tensor is missing", "without its head")


@pytest.mark.parametrize("family", SCORED)
def test_a_reward_model_is_no_policy_and_a_policy_is_no_judge(kept: Callable[..., Path], family: str) -> None:
    reward, policy = kept(family, "ForSequenceClassification"), kept(family)
    refused_twice(reward, "reward model or classifier")
    judge = ClassifierJudge(path=str(policy))
    refused(lambda: load_reward_model(policy), "score.weight", "its head was never trained, or is missing")
    refused(lambda: check_classifier(judge), "score.weight", "its head was never trained, or is missing")


@pytest.mark.parametrize("family", SCORED)
def test_a_new_head_may_be_missing_and_nothing_else(made: Callable[..., Path], family: str) -> None:
    folder = made(family)

    def load() -> PreTrainedModel:
        return load_checked(AutoModelForSequenceClassification, folder, None, "reward model", new={"score.weight"})

    body, policy = load().base_model.state_dict(), load_policy(folder).base_model.state_dict()
    assert body.keys() == policy.keys()
    assert all(torch.equal(body[name], policy[name]) for name in policy)
    change_tensors(folder, without_a_layer)
    refused(load, "missing", str(folder))


def test_a_judge_with_two_labels_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", random_model("llama", "ForSequenceClassification", num_labels=2))
    refused(lambda: check_classifier(ClassifierJudge(path=folder)), "2 labels")


def test_a_head_of_its_own_that_the_config_ties_is_refused(made: Callable[..., Path]) -> None:
    folder = made("llama")
    change_json(folder / "config.json", tie_word_embeddings=True)
    refused(lambda: load_policy(folder), "tie_word_embeddings")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("task", ["ForCausalLM", "ForSequenceClassification"])
def test_a_weight_that_is_no_number_is_named(made: Callable[..., Path], value: float, task: str) -> None:
    folder = made("llama", task)
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3, 5] = value
        return tensors

    change_tensors(folder, spoil)
    load = load_policy if task == "ForCausalLM" else load_reward_model
    refused(lambda: load(folder), str(folder), name, "1 of the 6144 numbers")


# -------------------------------------------------------------------------------------------- not causal


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
@pytest.mark.parametrize("ending", ["ForMaskedLM", "LMHeadModel"])
def test_a_masked_language_model_is_no_policy(tmp_path: Path, name: str, ending: str) -> None:
    settings = {"vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings)
    made = getattr(transformers, f"{name}{ending}", None) or getattr(transformers, f"{name}ForCausalLM")
    folder = save_model(tmp_path / "model", made(config))
    refused(lambda: inspect_policy(folder), "not a causal language model", "masked")


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_both_sides_is_found_by_computing(family: str) -> None:
    model = random_model(family)
    check_causal("here", model)
    embed = model.get_input_embeddings()
    # What a later token does to earlier logits in a model that attends to both sides.
    embed.register_forward_hook(lambda _, inputs, output: output + output.mean(dim=1, keepdim=True))
    refused(lambda: check_causal("here", model), "not a causal language model")


def test_bidirectional_attention_by_the_config_is_refused(made: Callable[..., Path]) -> None:
    folder = made("gemma3")
    change_json(folder / "config.json", use_bidirectional_attention=True)
    refused(lambda: inspect_policy(str(folder)), "use_bidirectional_attention")


def test_an_encoder_decoder_is_no_policy(tmp_path: Path) -> None:
    config = transformers.BartConfig(vocab_size=16, d_model=64, encoder_layers=1, decoder_layers=1,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=96,
                                     decoder_ffn_dim=96, max_position_embeddings=64)  # fmt: skip
    folder = save_model(tmp_path / "model", transformers.BartForConditionalGeneration(config))
    refused(lambda: inspect_policy(folder), "encoder-decoder")


# ------------------------------------------------------------------------------------------- damaged files


def emptied(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"")


def cut(name: str, share: float) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGE: dict[str, tuple[Change, str]] = {
    "weights-empty": (emptied("model.safetensors"), "model.safetensors: it is empty"),
    "weights-pointer": (written("model.safetensors", POINTER), "git lfs pull"),
    "weights-cut": (cut("model.safetensors", 0.7), "damaged or cut short"),
    "weights-header-cut": (cut("model.safetensors", 0.001), "damaged or cut short"),
    "weights-text": (written("model.safetensors", b"<html>404 not found</html>" * 9), "damaged or cut short"),
    "config-empty": (emptied("config.json"), "config.json: it is empty"),
    "config-pointer": (written("config.json", POINTER), "git lfs pull"),
    "config-cut": (cut("config.json", 0.5), "config.json: not valid JSON"),
    "config-list": (written("config.json", b"[1, 2]"), "not an object"),
    "config-latin": (written("config.json", b'{"a": "\xe9"}'), "not UTF-8"),
    "config-gone": (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    "tokenizer-empty": (emptied("tokenizer.json"), "tokenizer.json: it is empty"),
    "tokenizer-pointer": (written("tokenizer.json", POINTER), "git lfs pull"),
    "tokenizer-cut": (cut("tokenizer.json", 0.5), "tokenizer.json: not valid JSON"),
    "tokenizer-object": (written("tokenizer.json", b'{"a": 1}'), "no tokenizer can be loaded"),
    "tokenizer-kind": (lambda folder: _other_tokenizer(folder, {"type": "Unheard"}), "no tokenizer can be loaded"),
    "tokenizer-eos": (lambda folder: change_json(folder / "tokenizer_config.json", eos_token=5), "no tokenizer can be"),
    "tokenizer-length": (
        lambda folder: change_json(folder / "tokenizer_config.json", model_max_length="long"),
        "no tokenizer can be loaded",
    ),
    "tokenizer-vocabulary": (
        lambda folder: _other_tokenizer(folder, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
        "no tokenizer can be loaded",
    ),
    "tokenizer-gone": (lambda folder: _without(folder, "tokenizer*"), "there is no tokenizer in it"),
    "generation-cut": (cut("generation_config.json", 0.5), "generation_config.json: not valid JSON"),
    "weights-gone": (lambda folder: _without(folder, "*.safetensors"), "no weights in it"),
}


def _without(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def _other_tokenizer(folder: Path, model: dict[str, Any]) -> None:
    change_json(folder / "tokenizer.json", model=model)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(made: Callable[..., Path], damage: str) -> None:
    folder = made()
    change, words = DAMAGE[damage]
    change(folder)
    refused(lambda: check(folder), str(folder), words)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model-Q4_K_M.gguf", "tf_model.h5",
                                  "consolidated.safetensors"])  # fmt: skip
def test_weights_of_another_kind_are_named(made: Callable[..., Path], name: str) -> None:
    folder = made()
    (folder / "model.safetensors").rename(folder / name)
    refused(lambda: check(folder), name, "safetensors")


def test_missing_shards_are_named(made: Callable[..., Path]) -> None:
    folder = made(sharded=True)
    shards = sorted(folder.glob("*.safetensors"))
    shards[3].unlink()
    refused(lambda: check(folder), f"1 of the {len(shards)} files", shards[3].name)


@pytest.mark.parametrize("content", [b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"{", b"", POINTER])
def test_a_damaged_index_is_named(made: Callable[..., Path], content: bytes) -> None:
    folder = made(sharded=True)
    (folder / "model.safetensors.index.json").write_bytes(content)
    refused(lambda: check(folder), "model.safetensors.index.json")


def test_a_path_that_is_no_folder(tmp_path: Path, made: Callable[..., Path]) -> None:
    for path in (str(tmp_path / "nothing"), "./nothing", "~/models/nothing", "a/b/c"):
        refused(lambda path=path: inspect_policy(path), f"{path}: there is no such folder")  # type: ignore[misc]
        refused(lambda path=path: load_tokenizer(path), f"{path}: there is no such folder")  # type: ignore[misc]
    file = made() / "model.safetensors"
    refused(lambda: inspect_policy(str(file)), "give the folder")


# ------------------------------------------------------------------------------- configs that contradict themselves

NUMBERS: dict[str, Any] = {
    "num_attention_heads": [0, -2, "2", 2.5, True, 3, 10**12],
    "num_key_value_heads": [0, "x", 3],
    "hidden_size": [0, -64, "64", 63, 10**30, 10**9],
    "num_hidden_layers": [0, -1, "two", 10**9],
    "vocab_size": [0, "16", 15, 32000],
    "max_position_embeddings": [0, "64", -5],
    "head_dim": [0, -1, 31],
    "intermediate_size": [0, "wide", 97],
    "rms_norm_eps": ["small", -1.0, 1e30, float("nan")],
    "attention_dropout": [-0.1, 1.0, 7, float("nan")],
    "rope_parameters": [{"rope_type": "default", "rope_theta": theta} for theta in (0, -1, float("nan"), "x")],
    "model_type": ["unheard-of", 5, None, "gone"],
    "hidden_act": ["unheard-of", 5],
    "pad_token_id": [16, 99],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values], ids=str
)
def test_a_config_out_of_range_is_refused(made: Callable[..., Path], name: str, value: Any) -> None:
    folder = made()
    change_json(folder / "config.json", **{name: value})
    refused(lambda: check(folder), str(folder))


@pytest.mark.parametrize(("family", "name"), [("gpt2", "n_head"), ("gpt2", "n_embd"), ("gpt2", "n_layer"),
                                              ("opt", "num_attention_heads"), ("gpt-neox", "hidden_size")])  # fmt: skip
@pytest.mark.parametrize("value", [0, -1, "8", 7])
def test_a_config_out_of_range_is_refused_in_other_families(
    made: Callable[..., Path], family: str, name: str, value: Any
) -> None:
    folder = made(family)
    change_json(folder / "config.json", **{name: value})
    refused(lambda: check(folder), str(folder))


@pytest.mark.parametrize(("family", "changed", "words"), [
    ("gemma2", {"final_logit_softcapping": 0.0}, "NaN or infinite"),
    ("granite", {"logits_scaling": 0.0}, "NaN or infinite"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-45}}, "rotary frequencies"),
    ("gemma3", {"query_pre_attn_scalar": -1}, "cannot be run"),
])  # fmt: skip
def test_a_config_that_only_computing_shows_to_be_wrong(
    made: Callable[..., Path], family: str, changed: dict[str, Any], words: str
) -> None:
    folder = made(family)
    change_json(folder / "config.json", **changed)
    refused(lambda: base_model(PretrainedModel(path=str(folder)), 16), str(folder), words)


def test_a_context_that_is_too_short_is_found_from_the_config() -> None:
    for family in ("llama", "gpt2", "opt", "gpt-neox"):
        config = random_model(family).config
        check_context("here", config, 64)
        refused(lambda config=config: check_context("here", config, 65), "context of 64")  # type: ignore[misc]


def test_code_that_comes_with_a_model_is_named_and_not_run(made: Callable[..., Path]) -> None:
    folder = made()
    change_json(folder / "config.json", model_type="of-its-own", auto_map={"AutoConfig": "code.Own"})
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()", encoding="utf-8")
    refused(lambda: check(folder), "never run")
    assert not (folder / "ran").exists()


def test_code_beside_an_architecture_that_transformers_has_is_no_fault(made: Callable[..., Path]) -> None:
    folder = made("phi3")
    change_json(folder / "config.json", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Model"})
    check(folder)
    load_policy(folder)


# --------------------------------------------------------------------------------------- adapters, quantised weights


def adapted(folder: Path, base: Path | str, family: str = "llama", **settings: Any) -> PreTrainedModel:
    """Write an adapter of random numbers for the model at `base` to `folder`; the model with it, not merged."""
    tuned = get_peft_model(load_policy(base), LoraConfig(r=2, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    tuned.save_pretrained(str(folder))
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return cast(PreTrainedModel, tuned.eval())


@pytest.mark.parametrize("family", ["llama", "qwen2-tied", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_an_adapter_is_merged_into_its_base(
    kept: Callable[..., Path], tmp_path: Path, family: str, own_tokenizer: bool
) -> None:
    base, folder = kept(family), tmp_path / "adapter"
    tuned = adapted(folder, base)
    if own_tokenizer:
        tiny_tokenizer().save_pretrained(str(folder))
    check(folder, scored=True)
    ids = torch.arange(8)[None]
    merged = base_model(PretrainedModel(path=str(folder)), 16)
    assert torch.allclose(merged(ids).logits, tuned(ids).logits, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, load_policy(base)(ids).logits, atol=1e-3)
    save_policy(merged, load_tokenizer(folder), tmp_path / "merged")
    check(tmp_path / "merged")
    assert torch.equal(load_policy(tmp_path / "merged")(ids).logits, merged(ids).logits)


ADAPTER_FAULTS: dict[str, tuple[Change, str]] = {
    "no such base": (
        lambda folder: change_json(folder / "adapter_config.json", base_model_name_or_path="/no/such/base"),
        "an adapter of /no/such/base",
    ),
    "no base": (
        lambda folder: change_json(folder / "adapter_config.json", base_model_name_or_path=None),
        "does not name its base",
    ),
    "kind": (lambda folder: change_json(folder / "adapter_config.json", peft_type="IA3"), "only LORA"),
    "targets": (lambda folder: change_json(folder / "adapter_config.json", target_modules=["unheard"]), "unheard"),
    "rank": (lambda folder: change_json(folder / "adapter_config.json", r=4), "two sizes"),
    "broken settings": (cut("adapter_config.json", 0.5), "adapter_config.json: not valid JSON"),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "never read",
    ),
    "pointer": (written("adapter_model.safetensors", POINTER), "git lfs pull"),
    "missing": (
        lambda folder: _adapter_tensors(folder, lambda named: dict(list(named.items())[1:])),
        "1 of its tensors",
    ),
    "unknown": (
        lambda folder: _adapter_tensors(folder, lambda named: {**named, "base_model.model.more": torch.ones(2)}),
        "base_model.model.more",
    ),
}


def _adapter_tensors(folder: Path, change: TensorChange) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_an_adapter_that_cannot_be_merged_names_its_base(kept: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "adapter"
    adapted(folder, kept("llama"))
    change, words = ADAPTER_FAULTS[fault]
    change(folder)
    refused(lambda: check(folder), str(folder), words)
    refused(lambda: load_policy(folder), str(folder) if fault != "no such base" else "/no/such/base")


def test_an_adapter_that_is_not_a_number_is_named(kept: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(folder, kept("llama"))
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    _adapter_tensors(folder, lambda named: {**named, name: torch.full_like(named[name], float("nan"))})
    refused(lambda: load_policy(folder), "model.layers.1.mlp.up_proj.weight", "NaN")


def test_an_adapter_of_a_base_that_is_damaged_says_both(made: Callable[..., Path], tmp_path: Path) -> None:
    base, folder = made(), tmp_path / "adapter"
    adapted(folder, base)
    change_tensors(base, without_a_layer)
    refused(lambda: check(folder), f"{folder}: an adapter of {base}", "9 tensors are missing", "merge_and_unload")


def test_an_adapter_beside_a_model_is_refused(made: Callable[..., Path]) -> None:
    folder = made()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}', encoding="utf-8")
    refused(lambda: check(folder), "both a model", "adapter_config.json")


@pytest.mark.parametrize("settings", [
    {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "compressed-tensors"},
])  # fmt: skip
def test_quantised_weights_are_refused(made: Callable[..., Path], settings: dict[str, Any]) -> None:
    folder = made()
    change_json(folder / "config.json", quantization_config=settings)
    refused(lambda: check(folder), settings["quant_method"], "weights are not quantised")
    packed = torch.zeros(8, 64, dtype=torch.int32)
    name = "model.layers.0.mlp.up_proj"
    change_tensors(folder, lambda tensors: {**tensors, f"{name}.qweight": packed, f"{name}.qzeros": packed.clone()})
    refused(lambda: check(folder), settings["quant_method"], "cannot be trained")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_packed_weights_without_a_word_in_the_config_are_refused(made: Callable[..., Path], dtype: torch.dtype) -> None:
    folder = made()
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: {**tensors, name: torch.zeros(96, 64).to(dtype)})
    refused(lambda: check(folder), name, "quantised")


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_of_quantisation_in_a_file_of_their_own(made: Callable[..., Path], name: str) -> None:
    folder = made()
    (folder / name).write_text('{"bits": 4}', encoding="utf-8")
    refused(lambda: check(folder), name, "quantised")


# ---------------------------------------------------------------------------------------------- tokens without a row


def _with_token(folder: Path, role: str | None, text: str = "<|new|>", template: str | None = None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({role: text} if role else {"additional_special_tokens": [text]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_token_in_use_without_a_row_is_named(made: Callable[..., Path], family: str, role: str) -> None:
    folder = made(family)
    _with_token(folder, role)
    refused(lambda: check(folder), role.removesuffix("_token"), "'<|new|>'", "16", "resize_token_embeddings")


def test_a_token_that_the_template_writes_is_named(made: Callable[..., Path]) -> None:
    folder = made()
    _with_token(folder, None, "<|user|>", "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}")
    refused(lambda: check(folder), "<|user|>", "chat template", "resize_token_embeddings")


def test_a_token_that_nothing_writes_is_no_fault(made: Callable[..., Path]) -> None:
    folder = made()
    _with_token(folder, None, "<image>", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    check(folder)


@pytest.mark.parametrize("ends", [16, [2, 99], [40]])
def test_an_end_of_the_generation_config_without_a_row_is_named(made: Callable[..., Path], ends: Any) -> None:
    folder = made()
    change_json(folder / "generation_config.json", eos_token_id=ends, _from_model_config=False)
    refused(lambda: check(folder), "generation_config.json", "no row")


def test_an_architectures_default_end_that_is_no_token_is_no_fault(tmp_path: Path) -> None:
    folder = Path(save_model(tmp_path / "model", random_model("gpt2", bos_token_id=50256, eos_token_id=50256)))
    check(folder)
    load_policy(folder)


@pytest.mark.parametrize("ends", ["</s>", -3, [2, "x"], 2.5, True])
def test_an_end_of_the_generation_config_that_is_no_token(made: Callable[..., Path], ends: Any) -> None:
    folder = made()
    change_json(folder / "generation_config.json", eos_token_id=ends)
    refused(lambda: check(folder), "generation_config.json")


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = Path(save_model(tmp_path / "model", random_model("llama", vocab_size=12)))
    refused(lambda: check(folder), "16 tokens", "12 rows", repr(VOCABULARY[12]))


def test_an_embedding_with_spare_rows_is_no_fault(tmp_path: Path) -> None:
    folder = Path(save_model(tmp_path / "model", random_model("llama", vocab_size=64)))
    check(folder)


# -------------------------------------------------------------------------------------------------- the engine


def test_a_head_size_that_the_engine_lacks_is_named() -> None:
    def config(family: str, **changed: Any) -> Any:
        return random_model(family, **changed).config

    for accepted in (config("llama"), config("gemma2"), config("gpt2"), config("opt")):
        check_head_size("here", accepted)
    small: list[PreTrainedModel] = [config("llama", num_attention_heads=4), config("gpt2", n_head=4)]
    for lacking in (*small, config("qwen3", head_dim=48)):
        refused(lambda lacking=lacking: check_head_size("here", lacking), "vLLM", "resources.use_gpu")  # type: ignore[misc]


def test_devices_among_which_a_model_cannot_be_cut_are_named_with_those_that_can() -> None:
    def heads(number: int, shared: int, inner: int = 96) -> Any:
        return transformers.LlamaConfig(
            hidden_size=32 * number, num_attention_heads=number, num_key_value_heads=shared, intermediate_size=inner
        )

    smollm2, shared = heads(9, 3, 1536), heads(8, 2, 64)
    for settings, devices in ((smollm2, 1), (smollm2, 3), (shared, 2), (shared, 4), (shared, 8)):
        check_split("here", settings, devices)
    refused(
        lambda: check_split("here", smollm2, 2),
        "its 9 attention heads cannot be divided evenly among the devices of generation.tensor_parallel: 2; "
        "possible with this model: 1",
    )
    refused(
        lambda: check_split("here", heads(6, 2), 3), "its 2 key and value heads", "possible with this model: 1, 2, 6"
    )
    refused(lambda: check_split("here", heads(4, 4, 98), 4), "its 98 inner dimensions")
    check_split("here", random_model("gpt2").config, 2)
    refused(lambda: check_split("here", random_model("gpt2").config, 3), "attention heads")


# ------------------------------------------------------------------------------------------ tokens that the data have


def test_a_row_that_holds_a_token_without_a_row_is_rejected(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made()
    _with_token(folder, None, "<image>")
    data = tmp_path / "pairs.jsonl"
    texts = [("a b", "c d", "e f"), ("a <image>", "c d", "e f"), ("a b", "c <image>", "e f"), ("a", "b", "<image>")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in texts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = TextTask(data=str(data))
    tokenizer = Tokenizer.load(folder, None, task)
    (part,) = find_parts(str(data), "train")
    (chunk,) = read_chunks(part, COLUMNS, task.max_row_bytes)
    found = prepare_pairs(chunk, task, tokenizer, shares=NONE_HELD_OUT).to_pylist()
    assert [row["reason"] for row in found] == [None, NO_ROW, NO_ROW, NO_ROW]
    assert {row["detail"] for row in found[1:]} == {"'<image>'"}
    assert REMEDIES[NO_ROW].startswith("resize_token_embeddings")


def test_pretraining_text_that_holds_a_token_without_a_row_is_rejected(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made()
    _with_token(folder, None, "<image>")
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "a b c"}\n{"text": "a <image> c"}\n', encoding="utf-8")
    task = TextTask(data=str(data))
    (part,) = find_parts(str(data), "train")
    (chunk,) = read_chunks(part, TEXT_COLUMNS, task.max_row_bytes)
    found = prepare_pieces(chunk, task, Tokenizer.load(folder, None, task)).to_pylist()
    assert [row["reason"] for row in found] == [None, NO_ROW]


# -------------------------------------------------------------------------------------------- before anything starts

ROWS = [{"prompt": f"{a} {b}", "chosen": a, "rejected": b} for a in "abcdefghij" for b in "abcdefghij" if a != b]


def _said(row: dict[str, str], answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]


def comparison(folder: Path, data: Path, **changed: Any) -> Comparison:
    tree = {
        "name": "try",
        "output": str(data.parent / "out"),
        "task": {"kind": "text", "data": str(data), "max_prompt_tokens": 16, "max_response_tokens": 16},
        "model": {"kind": "pretrained", "path": str(folder)},
        "judge": {"kind": "learned"},
        "entries": [{"name": "dpo", "method": {"kind": "dpo"}}],
    }
    return parse_config({**tree, **changed})


REFUSED: dict[str, tuple[str, Change, dict[str, Any], str]] = {
    "layer": ("llama", lambda folder: change_tensors(folder, without_a_layer), {}, "9 tensors are missing"),
    "pointer": ("llama", written("model.safetensors", POINTER), {}, "git lfs pull"),
    "eos": ("llama", lambda folder: _with_token(folder, "eos_token"), {}, "resize_token_embeddings"),
    "head size": ("small", lambda folder: None, {}, "resources.use_gpu"),
    "context": ("llama", lambda folder: None, {"task": {"max_prompt_tokens": 60}}, "context of 64"),
    "no scores": ("granite", lambda folder: None, {}, "cannot become a reward model or a critic"),
    "tokenizer": ("llama", cut("tokenizer.json", 0.5), {}, "tokenizer.json: not valid JSON"),
    "config": ("llama", lambda folder: change_json(folder / "config.json", num_attention_heads=0), {}, "num_attention"),
    "template": (
        "llama",
        lambda folder: change_json(folder / "tokenizer_config.json", chat_template="{% for m in messages %}"),
        {"task": {"data": "MESSAGES"}},
        "the chat template refuses it",
    ),
    "template kind": (
        "llama",
        lambda folder: change_json(folder / "tokenizer_config.json", chat_template=5),
        {"task": {"data": "MESSAGES"}},
        "chat",
    ),
    "judge": ("llama", lambda folder: None, {"judge": {"kind": "classifier", "path": "FOLDER"}}, "judge classifier"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_comparison_is_refused_before_ray_starts(made: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    family, change, changed, words = REFUSED[fault]
    if family == "small":
        folder = Path(save_model(tmp_path / "small", random_model("llama", num_attention_heads=4)))
    else:
        folder = made(family)
    change(folder)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    messages = tmp_path / "messages.jsonl"
    said = [{"chosen": [*_said(row, "chosen")], "rejected": [*_said(row, "rejected")]} for row in ROWS]
    messages.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    whole = comparison(folder, data).model_dump()
    for key, value in changed.items():
        places = {"FOLDER": str(folder), "MESSAGES": str(messages)}
        value = {name: places.get(given, given) for name, given in value.items()}
        whole[key] = {**whole[key], **value} if key == "task" else value
    refused(lambda: check_input(parse_config(whole)), str(folder), words)


def test_the_doctor_predicts_nothing_of_a_model_that_cannot_be_made(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made()
    known = comparison(folder, tmp_path / "pairs.jsonl")
    assert model_settings(known) is not None
    change_json(folder / "config.json", num_attention_heads=0)
    assert model_settings(known) is None


def test_a_whole_model_passes_the_checks_of_a_comparison(kept: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    judge = {"kind": "classifier", "path": str(kept("llama", "ForSequenceClassification"))}
    for family in ("llama", "gpt2", "gemma2"):
        check_input(comparison(kept(family), data))
    check_input(comparison(kept("granite"), data, judge=judge))
