"""From text to token ids, once, with an exact boundary between prompt and response.

Prompt and response are tokenised apart and put one after the other, so that the boundary is exact by construction and
the prompt's ids are the very ones that generation is given. A prompt starts with exactly one bos (where the tokenizer
has one), a response ends with exactly one eos; a bos or eos that a chat template or the text itself wrote there is not
doubled.

Messages go through the tokenizer's chat template. A tokenizer without one gets them as a transcript: a blank line,
`System:`, `Human:` or `Assistant:`, and the content, as in HH-RLHF. Plain prompts stay plain whatever the tokenizer.

Truncation: a prompt over the limit is dropped, or keeps its bos and its last tokens; a response over the limit keeps
its first tokens and so loses its eos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefarena.config import TextTask
from prefarena.data.formats import IDENTICAL, Message, Pair, Unusable
from prefarena.errors import UserError

PROMPT_TOO_LONG = "prompt too long"
TEMPLATE_REFUSES = "the chat template refuses it"
END_INSIDE = "response has an end-of-sequence token inside"
IDENTICAL_CUT = IDENTICAL + " after truncation"

_TURNS = {"user": "Human", "assistant": "Assistant", "system": "System", "developer": "System", "tool": "Tool"}


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a pair, and what truncation touched."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_cut: bool
    num_responses_cut: int


@dataclass(frozen=True)
class Tokenizer:
    """Prompts and responses to ids, within a task's limits. Raises UserError where these leave no room."""

    tokenizer: PreTrainedTokenizerBase
    task: TextTask

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            name = self.tokenizer.name_or_path
            raise UserError(
                f"{name}: its tokenizer has no eos token, so the end of a response cannot be learnt; set one"
            )
        if self.tokenizer.bos_token_id is not None and self.task.max_prompt_tokens < 2:
            raise UserError("task.max_prompt_tokens: 1 leaves no room for a prompt after its bos token")

    def pair(self, pair: Pair) -> TokenPair:
        """Ids within the limits. Raises Unusable where the pair cannot be trained on."""
        prompt_ids, prompt_cut = self._fit_prompt(self.prompt(pair))
        answers = [self.response(pair, text) for text in (pair.chosen, pair.rejected)]
        limit = self.task.max_response_tokens
        chosen, rejected = (ids[:limit] for ids in answers)
        if answers[0] == answers[1]:
            raise Unusable(IDENTICAL)
        if chosen == rejected:
            raise Unusable(IDENTICAL_CUT)
        return TokenPair(prompt_ids, chosen, rejected, prompt_cut, sum(len(ids) > limit for ids in answers))

    def prompt(self, pair: Pair) -> list[int]:
        """The prompt's ids at full length: one bos, then the text."""
        text = pair.prompt if isinstance(pair.prompt, str) else self._render(pair.messages or [])
        ids, bos = self._encode(text), self.tokenizer.bos_token_id
        while ids and ids[0] == bos:
            ids = ids[1:]
        return ids if bos is None else [bos, *ids]

    def response(self, pair: Pair, answer: str) -> list[int]:
        """An answer's ids at full length: the text, then one eos."""
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        messages = pair.messages
        text = answer if messages is None else self._render_answer(messages, answer)
        ids = self._encode(text)
        if messages is not None and eos in self._encode(answer):
            raise Unusable(END_INSIDE)
        if messages is not None and eos in ids:
            ids = ids[: ids.index(eos)]  # what a template writes after the end of the turn is not the answer's
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        if eos in ids or (bos is not None and bos in ids):
            raise Unusable(END_INSIDE)
        return [*ids, eos]

    def text(self, text: str) -> list[list[int]]:
        """Pretraining text as pieces of at most prompt + response tokens, each with a bos, the last with an eos."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = [*self._encode(text), self.tokenizer.eos_token_id]
        size = self.task.max_prompt_tokens + self.task.max_response_tokens - len(bos)
        return [bos + ids[start : start + size] for start in range(0, len(ids), size)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _fit_prompt(self, ids: list[int]) -> tuple[list[int], bool]:
        limit = self.task.max_prompt_tokens
        if len(ids) <= limit:
            return ids, False
        if self.task.long_prompts == "drop":
            raise Unusable(PROMPT_TOO_LONG, f"{len(ids)} tokens")
        head = ids[:1] if self.tokenizer.bos_token_id is not None else []
        return head + ids[len(ids) - (limit - len(head)) :], True

    def _render(self, messages: list[Message], answered: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            turns = "".join(f"\n\n{_TURNS[m['role']]}: {m['content']}" for m in messages)
            return turns if answered else turns + "\n\nAssistant:"
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered)
        except TemplateError as error:
            raise Unusable(TEMPLATE_REFUSES, str(error)) from None
        return str(text)

    def _render_answer(self, messages: list[Message], answer: str) -> str:
        """What the whole conversation has after its prompt; the bare answer where a template rewrites the prompt."""
        prompt = self._render(messages)
        whole = self._render([*messages, {"role": "assistant", "content": answer}], answered=True)
        return whole.removeprefix(prompt) if whole.startswith(prompt) else answer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, learnt from `texts` and saved as a transformers folder.

    The same texts in the same order give the same tokenizer. pad, bos and eos are distinct tokens 0, 1 and 2. Raises
    UserError where `vocab_size` cannot hold them and the 256 bytes.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    if vocab_size < 256 + len(special):
        raise UserError(f"model.vocab_size: {vocab_size} is too small for 256 bytes and {len(special)} special tokens")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer
