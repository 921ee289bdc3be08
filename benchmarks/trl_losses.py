"""TRL's side of benchmarks/loss_parity.py. Runs in TRL's own environment, so it imports nothing of Prefarena.

    python trl_losses.py SPEC

The losses are computed by the methods of TRL's trainers, as training calls them. Log-probs of tokens come from the
model's logits, in its dtype: the head that TRL 1.16 fuses with them computes in float32 whatever the model is in. SPEC
is the JSON that loss_parity.py writes; loss and gradient of each case go to the file that it names.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

Batch = dict[str, Tensor]


class GivenLogProbs:
    """Stands where a trainer calls its model, and answers with log-probs of tokens that are given, [rows, T-1].

    Each call gets the next ones. What TRL makes metrics of is zero, and so is what it aligns WPO's weights by.
    """

    def __init__(self, *given: Tensor) -> None:
        self._given = list(given)

    def __call__(self, **_: Any) -> SimpleNamespace:
        return answered(self._given.pop(0))


class WholeLogits:
    """Stands there, and answers with log-probs of the model's logits."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        del fused_lm_head
        log_probs = self._model(**inputs).logits[:, :-1].log_softmax(-1)
        following = labels[:, 1:]
        taken = log_probs.gather(-1, following.clamp(min=0)[..., None])[..., 0]
        return answered(taken * (following != -100))


def answered(log_probs: Tensor) -> SimpleNamespace:
    """As TRL's patched models answer."""
    nothing = torch.zeros_like(log_probs)
    zeros = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), nothing)
    return SimpleNamespace(log_probs=log_probs, is_top1=nothing.bool(), **zeros)


class TokenisedDPO(DPOTrainer):
    """DPOTrainer on pairs that are token ids already; TRL 1.16 takes text alone."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class TokenisedKTO(KTOTrainer):
    """KTOTrainer, likewise."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def sequences(prompts: list[list[int]], answers: list[list[int]], pad: int, prefix: str = "") -> Batch:
    """As TRL's collators lay them out."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return {
        f"{prefix}input_ids": padded(rows, pad),
        f"{prefix}attention_mask": padded([[1] * len(row) for row in rows], 0),
        f"{prefix}completion_mask": padded(masks, 0),
    }


class Side:
    """The batch of a spec, and the models; in the given dtype."""

    def __init__(self, spec: dict[str, Any], dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self.prompts, self.chosen, self.rejected = (list(column) for column in zip(*spec["pairs"], strict=True))
        self.tokenizer = AutoTokenizer.from_pretrained(spec["policy"])
        self.pad = spec["pad"]
        with np.load(spec["given"]) as arrays:
            self.given = {name: torch.from_numpy(arrays[name]).to(dtype) for name in arrays.files}
        self.leaf = self.given["policy"].requires_grad_()
        self.given["policy"] = self.leaf * (self.leaf.detach() != 0)  # zero at tokens that are of no response

    def model(self, which: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.spec[which], dtype=self.dtype, attn_implementation="sdpa"
        ).eval()

    def trainer(self, kind: Any, config: Any, columns: dict[str, list[Any]], settings: dict[str, Any]) -> Any:
        arguments = config(
            output_dir=self.spec["output"], use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
            gradient_checkpointing=False, max_length=None, **settings,
        )  # fmt: skip
        trainer = kind(
            model=self.model("policy"), ref_model=self.model("reference"), args=arguments,
            train_dataset=Dataset.from_dict(columns), processing_class=self.tokenizer,
        )  # fmt: skip
        trainer.model.eval()
        return trainer

    # ------------------------------------------------------------------------------------ the four trainers

    def dpo(self, settings: dict[str, Any], with_model: bool, rows: slice) -> tuple[Tensor, list[Tensor]]:
        columns = {"prompt_ids": self.prompts, "chosen_ids": self.chosen, "rejected_ids": self.rejected}
        trainer = self.trainer(TokenisedDPO, DPOConfig, columns, settings)
        prompts, answers = self.prompts[rows], self.chosen[rows] + self.rejected[rows]
        inputs = sequences(prompts + prompts, answers, self.pad)
        if with_model:
            return self._through_models(trainer, inputs)
        policy, reference = self._tokens("policy", rows), self._tokens("reference", rows)
        width = inputs["input_ids"].shape[1] - 1
        trainer.ref_model = GivenLogProbs(reference[:, :width])
        return trainer._compute_loss(GivenLogProbs(policy[:, :width]), inputs, False), [self.leaf]

    def kto(self, settings: dict[str, Any], with_model: bool, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """Chosen responses are desirable; the mismatched response of each is that of the row before."""
        prompts, answers = (self.prompts + self.prompts), self.chosen + self.rejected
        others = answers[-1:] + answers[:-1]
        labels = [True] * len(self.chosen) + [False] * len(self.rejected)
        columns = {"prompt_ids": prompts, "completion_ids": answers, "KL_completion_ids": others, "label": labels}
        trainer = self.trainer(TokenisedKTO, KTOConfig, columns, settings)
        inputs = sequences(prompts, answers, self.pad) | sequences(prompts, others, self.pad, "KL_")
        inputs["label"] = torch.tensor(labels)
        if with_model:
            return self._through_models(trainer, inputs)
        trainer.ref_model = GivenLogProbs(self.given["reference_others"], self.given["reference"])
        policy = GivenLogProbs(self.given["policy_others"], self.given["policy"])
        return trainer._compute_loss(policy, inputs, False), [self.leaf]

    def cpo(self, settings: dict[str, Any], with_model: bool, rows: slice) -> tuple[Tensor, list[Tensor]]:
        trainer = CPOTrainer.__new__(CPOTrainer)
        defaults = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "loss_type": "sigmoid"}
        self._set(trainer, defaults | settings, "pad_token_id")
        if with_model:
            return self._from_logits(trainer)
        chosen, rejected = self._sums(average=trainer.loss_type == "simpo")
        return trainer.cpo_loss(chosen, rejected)[0].mean(), [self.leaf]

    def orpo(self, settings: dict[str, Any], with_model: bool, rows: slice) -> tuple[Tensor, list[Tensor]]:
        trainer = ORPOTrainer.__new__(ORPOTrainer)
        self._set(trainer, settings, "padding_value")
        if with_model:
            return self._from_logits(trainer)
        return -trainer.odds_ratio_loss(*self._sums(average=True))[0].mean(), [self.leaf]

    # --------------------------------------------------------------------------------------------- what they share

    def _set(self, trainer: Any, settings: dict[str, Any], pad_name: str) -> None:
        """What the trainer's losses read of itself; making one would have it tokenise text."""
        own = {"is_encoder_decoder": False, "aux_loss_enabled": False, "accelerator": Accelerator(cpu=True)}
        for name, value in (own | settings | {pad_name: self.pad}).items():
            setattr(trainer, name, value)

    def _through_models(self, trainer: Any, inputs: Batch) -> tuple[Tensor, list[Tensor]]:
        trainer.ref_model = WholeLogits(trainer.ref_model)
        loss = trainer._compute_loss(WholeLogits(trainer.model), inputs, False)
        return loss, list(trainer.model.parameters())

    def _from_logits(self, trainer: Any) -> tuple[Tensor, list[Tensor]]:
        model = self.model("policy")
        batch: Batch = {}
        for side, answers in (("chosen", self.chosen), ("rejected", self.rejected)):
            rows = sequences(self.prompts, answers, self.pad, f"{side}_")
            labels = rows[f"{side}_input_ids"].masked_fill(rows.pop(f"{side}_completion_mask") == 0, -100)
            batch |= rows | {f"{side}_labels": labels}
        return trainer.get_batch_loss_metrics(model, batch)[0], list(model.parameters())

    def _tokens(self, name: str, rows: slice) -> Tensor:
        chosen, rejected = self.given[name].chunk(2)
        return torch.cat([chosen[rows], rejected[rows]])

    def _sums(self, average: bool) -> tuple[Tensor, Tensor]:
        """Log-probs of both responses, or those of a token of them."""
        sums = self.given["policy"].sum(1)
        counts = torch.tensor([len(answer) for answer in self.chosen + self.rejected])
        chosen, rejected = (sums / counts if average else sums).chunk(2)
        return chosen, rejected


def run(spec: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    num_pairs = len(spec["pairs"])
    for case in spec["cases"]:
        parts = case.get("parts", 1)
        losses, gradient = [], None
        for part in range(parts):
            side = Side(spec, getattr(torch, case.get("dtype", "float64")))
            rows = slice(part * num_pairs // parts, (part + 1) * num_pairs // parts)
            loss, leaves = getattr(side, case["trainer"])(case["settings"], spec["with_model"], rows)
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            flat = torch.cat([slope.flatten().double() for slope in slopes]) / parts
            losses.append(float(loss.detach()) / parts)
            gradient = flat if gradient is None else gradient + flat
        assert gradient is not None
        found[f"{case['name']}/loss"], found[f"{case['name']}/gradient"] = sum(losses), gradient.numpy()
    return found


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    torch.set_num_threads(1)
    np.savez(spec["found"], **run(spec))


if __name__ == "__main__":
    main()
