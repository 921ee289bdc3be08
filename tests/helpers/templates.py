"""Chat templates of well-known families, and tokenizers with a prefix space, in small."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<User>", "<Assistant>",
]  # fmt: skip
_TURNS = "{% for m in messages %}{{ TURN }}{% endfor %}{% if add_generation_prompt %}{{ ASK }}{% endif %}"


def _turns(turn: str, ask: str) -> str:
    return _TURNS.replace("TURN", turn).replace("ASK", ask)


CHATML = _turns("'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'", "'<|im_start|>assistant\\n'")
#: Takes no notice of `add_generation_prompt`.
CHATML_UNASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
#: Opens the next turn always.
ALWAYS_OPEN = CHATML_UNASKED + "{{ '<|im_start|>assistant\\n' }}"
ZEPHYR = _turns("'<|' + m.role + '|>\\n' + m.content + eos_token + '\\n'", "'<|assistant|>\\n'")
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = "{{ bos_token }}" + _turns(
    "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>'",
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
)
GEMMA = "{{ bos_token }}" + _turns(
    "'<start_of_turn>' + {'assistant': 'model'}.get(m.role, m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n'",
    "'<start_of_turn>model\\n'",
)
#: The last answer is written with its thoughts, an empty one where it has none.
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    "{% if parts | length > 1 %}{{ parts[0].split('<think>')[-1].strip('\\n') }}{% endif %}"
    "{{ '\\n</think>\\n\\n' + parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: Strips thoughts from answers; the second opens one for generation.
R1 = "{{ bos_token }}" + _turns(
    "'<User>' + m.content if m.role == 'user' else '<Assistant>' + m.content.split('</think>')[-1] + eos_token",
    "'<Assistant>'",
)
R1_OPEN = R1.replace("{{ '<Assistant>' }}", "{{ '<Assistant><think>\n' }}")

#: Each template with the text of the token that ends its turns.
ENDS = [
    (CHATML, "<|im_end|>"), (ALWAYS_OPEN, "<|im_end|>"), (ZEPHYR, "</s>"), (LLAMA2, "</s>"), (LLAMA3, "<|eot_id|>"),
    (GEMMA, "<end_of_turn>"), (QWEN3, "<|im_end|>"), (R1, "</s>"),
]  # fmt: skip
TEXTS = ["What is a river? It is large.", "user assistant model yes no think Answer: 4", "  two spaces\n\nlines"] * 3


def tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """`bytes`: a byte-level BPE; `trimmed`: the same with offsets that leave out white space (GPT-2's); `prefix`: BPE
    with byte fallback behind a normaliser that prepends a space (Llama-2); `metaspace`: the same by a pre-tokenizer;
    `unigram`: SentencePiece's other model."""
    settings = {"special_tokens": SPECIAL, "show_progress": False}
    if kind in ("bytes", "trimmed"):
        fast = Tokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast.train_from_iterator(
            TEXTS,
            trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, **settings),  # type: ignore[arg-type]
        )
        if kind == "trimmed":
            fast.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "unigram":
        fast = Tokenizer(models.Unigram())
        fast.pre_tokenizer = pre_tokenizers.Metaspace()
        fast.decoder = decoders.Metaspace()
        fast.train_from_iterator(
            TEXTS,
            trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", **settings),  # type: ignore[arg-type]
        )
    else:
        fast = _sentencepiece(kind)
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        additional_special_tokens=SPECIAL[3:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = template
    return made


def _sentencepiece(kind: str) -> Tokenizer:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    raw.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    )
    vocabulary = raw.get_vocab(with_added_tokens=True)
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.add_special_tokens(SPECIAL)
    if kind == "prefix":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast
