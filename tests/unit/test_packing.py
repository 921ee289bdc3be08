"""Packed rows against one sequence at a time, for each family of models; the chunked head against a plain softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefarena.modeling import chunked_head
from prefarena.modeling.chunked_head import Head, chunked_comparison, chunked_logps
from prefarena.modeling.logprobs import LogProbs, Sequences, sequence_logps, token_logps, token_logps_and_entropy
from prefarena.modeling.packing import pack

VOCABULARY = 97
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Families that are packed: their config, and what it is made from.
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama with tied embeddings": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "mistral, its window wide enough": ("Mistral", LLAMA | {"sliding_window": 256}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "phi3": ("Phi3", LLAMA),
    "gemma": ("Gemma", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2", LLAMA | {"head_dim": 8}),
    "gemma3": ("Gemma3Text", LLAMA | {"head_dim": 8}),
    "olmo2": ("Olmo2", LLAMA),
    "smollm3": ("SmolLM3", LLAMA),
    "starcoder2": ("Starcoder2", LLAMA),
    "granite, its logits scaled": ("Granite", LLAMA | {"logits_scaling": 2.0}),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoX", GPT | {"intermediate_size": 48}),
    "opt": ("OPT", GPT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
#: Their norms keep float64; RMSNorm is computed in float32, which shows in sums over tokens.
LAYER_NORM = ("gpt2", "gpt-neox", "opt", "starcoder2")
#: Families that cannot be packed, and what the note to the user says.
PADDED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral, its window too narrow": ("Mistral", LLAMA | {"sliding_window": 32}, "reaches 32 tokens back"),
    "bloom, which has no positions": (
        "Bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "attention interface",
    ),
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "recurrent"),
}
MAX_LENGTH = 200


def make(kind: str, sizes: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the start, where attention hardly matters
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def some_ids(*sizes: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        yield torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()


#: Short trees beside long ones; one, two and three responses.
PROMPTS = list(some_ids(3, 70, 9, 120, 5))
RESPONSES = [list(some_ids(*sizes)) for sizes in ((5, 3), (40, 30), (1, 9), (20, 1, 33), (6,))]


def one_by_one(model: PreTrainedModel) -> Tensor:
    """log pi(y|x) [R] by transformers alone."""
    found = []
    for prompt, answers in zip(PROMPTS, RESPONSES, strict=True):
        for answer in answers:
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found)


def gradients(model: PreTrainedModel, logps: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    return list(torch.autograd.grad((logps * weights).sum(), list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("family", PACKED)
def test_packed_log_probs_and_gradients_are_those_of_each_sequence_alone(family: str) -> None:
    expected_model, model = make(*PACKED[family]), make(*PACKED[family])
    module = LogProbs(model, MAX_LENGTH)
    assert module.packed
    expected, (found, batch) = one_by_one(expected_model), sequence_logps(module, PROMPTS, RESPONSES)
    assert batch.input_ids.shape == (1, sum(map(len, PROMPTS)) + sum(len(y) for ys in RESPONSES for y in ys))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(model, found), gradients(expected_model, expected), strict=True):
        if theirs is not None:  # a tied or unused parameter
            limit = 1e-9 if family in LAYER_NORM else 1e-5 * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


@pytest.mark.parametrize("family", PADDED)
def test_models_that_cannot_be_packed_are_found_out_and_told(family: str) -> None:
    kind, sizes, note = PADDED[family]
    expected = one_by_one(make(kind, sizes))
    module = LogProbs(make(kind, sizes), MAX_LENGTH)
    assert not module.packed and note in module.notes[0]
    found, batch = sequence_logps(module, PROMPTS, RESPONSES)
    assert batch.trees is None and len(batch.input_ids) == sum(map(len, RESPONSES))
    # some compute parts in float32 whatever they are asked
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 if kind == "Mistral" else 2e-4)


def test_a_window_that_may_be_too_narrow_is_not_packed() -> None:
    model = make("Mistral", LLAMA | {"sliding_window": 256})
    assert not LogProbs(model).packed and not LogProbs(model, 257).packed
    assert LogProbs(model, 256).packed


def test_a_packed_model_generates_and_saves_as_ever(tmp_path: Any) -> None:
    model, untouched = make("Llama", LLAMA), make("Llama", LLAMA)
    LogProbs(model, MAX_LENGTH)
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    generate = [getattr(one, "generate") for one in (model, untouched)]  # noqa: B009 - not in PreTrainedModel's type
    ours, theirs = (one(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for one in generate)
    assert ours.tolist() == theirs.tolist()
    model.save_pretrained(tmp_path)
    assert "trees" not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # a plain head, and one that is not
def test_temperature_and_entropy(family: str) -> None:
    module = LogProbs(make(*PACKED[family]), MAX_LENGTH)
    sequences = Sequences.of(PROMPTS, [answers[0] for answers in RESPONSES])
    logps, entropy = token_logps_and_entropy(module, sequences, temperature=0.7)
    torch.testing.assert_close(token_logps(module, sequences, 0.7), logps, rtol=0, atol=1e-12)
    for row, prompt in enumerate(PROMPTS):
        answer = RESPONSES[row][0]
        logits = make(*PACKED[family])(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, -1)
        where = sequences.response_mask[row]
        torch.testing.assert_close(logps[row][where], expected.gather(1, torch.tensor(answer)[:, None])[:, 0])
        torch.testing.assert_close(entropy[row][where], -(expected.exp() * expected).sum(-1))
        assert (logps[row][~where] == 0).all() and (entropy[row][~where] == 0).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3"])
def test_a_row_laid_out_for_a_gpu_gives_the_same_log_probs_and_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's layout, masks and attention call, on the CPU: FlexAttention's own arithmetic without its kernel."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # it refuses backward
    model = make(*PACKED[family])
    module = LogProbs(model, MAX_LENGTH)
    found = {}
    for in_blocks in (False, True):
        batch = pack(PROMPTS, RESPONSES, in_blocks=in_blocks)
        assert batch.trees is not None and (batch.trees.blocks is not None) == in_blocks
        logps = batch.sums(module(batch)[0])
        found[in_blocks] = [logps, *gradients(model, logps)]
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 if family in LAYER_NORM else 1e-5)


def test_sums_over_responses_that_keep_their_order_on_a_gpu_are_the_same_sums() -> None:
    batch = pack(PROMPTS, [[*answers, []] for answers in RESPONSES])  # an empty answer at the end of each
    values = torch.randn(len(batch.targets), generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    factors = torch.linspace(-1, 1, len(batch.lengths)).double()
    for sums in (batch.sums(values), batch.sums(values, in_rows=True)):
        expected = torch.stack([values[batch.response_of == index].sum() for index in range(len(batch.lengths))])
        torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad((sums * factors).sum(), values, retain_graph=True)
        torch.testing.assert_close(gradient, factors[batch.response_of], rtol=0, atol=0)


# -------------------------------------------------------------------------------------- the chunked head


@pytest.mark.parametrize("tiles", [(1024, 2048), (7, 11), (1, 1000), (1000, 1)])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_head_is_a_log_softmax_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int], entropy: bool, bias: bool
) -> None:
    monkeypatch.setattr(chunked_head, "TOKENS", tiles[0])
    monkeypatch.setattr(chunked_head, "VOCABULARY", tiles[1])
    generator = torch.Generator().manual_seed(0)
    hidden, weight, shift = (
        torch.randn(*shape, generator=generator).double().requires_grad_() for shape in ((29, 8), (53, 8), (53,))
    )
    targets = torch.randint(0, 53, (29,), generator=generator)
    factors = torch.randn(2, 29, generator=generator).double()
    log_softmax = torch.log_softmax((hidden @ weight.t() + (shift if bias else 0)) / 0.6, -1)
    expected = [log_softmax.gather(1, targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)]
    found = chunked_logps(hidden, weight, shift if bias else None, targets, temperature=0.6, entropy=entropy)
    wanted = [hidden, weight, *([shift] if bias else [])]
    losses = []
    for values in (expected, found):
        torch.testing.assert_close(values[0], expected[0], rtol=0, atol=1e-12)
        loss = (values[0] * factors[0]).sum()
        if entropy:
            assert values[1] is not None
            torch.testing.assert_close(values[1], expected[1], rtol=0, atol=1e-12)
            loss = loss + (values[1] * factors[1]).sum()
        losses.append(torch.autograd.grad(loss, wanted))
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiles", [(1024, 2048), (7, 11), (5, 100), (100, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_divergences_are_those_of_whole_distributions(
    monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int], bias: bool
) -> None:
    """Of heads of other widths too; rows whose logits are all far above or below the others' change nothing."""
    monkeypatch.setattr(chunked_head, "TOKENS", tiles[0])
    monkeypatch.setattr(chunked_head, "VOCABULARY", tiles[1])
    generator = torch.Generator().manual_seed(0)
    sides = []
    for width in (8, 5):
        hidden, weight, shift = (
            torch.randn(*shape, generator=generator) for shape in ((29, width), (53, width), (53,))
        )
        hidden[3] *= 40.0
        sides.append((hidden.double(), Head(weight.double(), (shift + 500).double() if bias else None)))
    p, q = (
        torch.log_softmax((hidden @ head.weight.t() + (0 if head.bias is None else head.bias)) / 0.6, -1)
        for hidden, head in sides
    )
    targets = torch.randint(53, (29,), generator=generator)
    found = chunked_comparison(*sides[0], *sides[1], targets, temperature=0.6)
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.reverse_kl, (q.exp() * (q - p)).sum(-1), rtol=1e-10, atol=1e-10)
    for logps, expected in ((found.logps, p), (found.other_logps, q)):
        torch.testing.assert_close(logps, expected[torch.arange(29), targets], rtol=1e-10, atol=1e-10)
    same = chunked_comparison(*sides[0], *sides[0], targets)
    assert not same.kl.any() and not same.reverse_kl.any() and torch.equal(same.logps, same.other_logps)


def test_divergences_of_half_precision_are_summed_in_more(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    (hidden, weight), (other, other_weight) = (
        (torch.randn(40, 64, generator=generator).bfloat16(), torch.randn(3000, 64, generator=generator).bfloat16())
        for _ in range(2)
    )
    targets = torch.arange(40) * 70
    found, _, logps, _ = chunked_comparison(hidden, Head(weight, None), other, Head(other_weight, None), targets)
    p, q = ((a.double() @ b.double().t()).log_softmax(-1) for a, b in ((hidden, weight), (other, other_weight)))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps, p[torch.arange(40), targets], rtol=1e-5, atol=1e-5)


def test_vocabularies_of_two_sizes_have_no_divergence() -> None:
    one, other = (Head(torch.ones(size, 4), None) for size in (7, 8))
    with pytest.raises(ValueError, match="vocabularies of 7 and 8 tokens"):
        chunked_comparison(torch.ones(2, 4), one, torch.ones(2, 4), other, torch.zeros(2, dtype=torch.long))


def test_a_frozen_head_gets_no_gradient_and_half_precision_is_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 64, generator=generator).bfloat16() for size in (40, 3000))
    targets = torch.randint(0, 3000, (40,), generator=generator)
    logps, _ = chunked_logps(hidden.requires_grad_(), weight, None, targets)
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), exact, rtol=0, atol=1e-4)
    logps.sum().backward()
    assert weight.grad is None and hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_responses_and_tokens_keep_their_order_in_both_layouts() -> None:
    packed, padded = (pack(PROMPTS, RESPONSES, shared=shared) for shared in (True, False))
    flat = [token for answers in RESPONSES for answer in answers for token in answer]
    lengths = [len(answer) for answers in RESPONSES for answer in answers]
    for batch in (packed, padded):
        assert batch.targets.tolist() == flat and batch.lengths.tolist() == lengths
        assert batch.sums(torch.ones(len(flat))).tolist() == lengths
        ids = batch.input_ids.flatten()
        firsts = [0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()]
        ends = [prompt[-1] for prompt, answers in zip(PROMPTS, RESPONSES, strict=True) for _ in answers]
        assert ids[batch.sources[firsts]].tolist() == ends
        assert ids[batch.last].tolist() == [answer[-1] for answers in RESPONSES for answer in answers]
    assert packed.position_ids is not None
    expected: list[int] = []
    for prompt, answers in zip(PROMPTS, RESPONSES, strict=True):
        expected += [*range(len(prompt)), *(len(prompt) + i for answer in answers for i in range(len(answer)))]
    assert packed.position_ids[0].tolist() == expected
