"""A step of the off-policy loop against the model by itself: transformers' own forward pass, in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from off_policy import metric_rows

from prefarena.config import Optimisation
from prefarena.data.tables import write_rows
from prefarena.modeling.logprobs import LogProbs
from prefarena.records import DEMONSTRATIONS
from prefarena.training.off_policy import train
from prefarena.training.terms import LikelihoodTerm, Shares
from prefarena.training.worker import Worker
from tests.helpers.models import random_model

DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
    "phi3": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_training_drops_nothing_out(tmp_path: Path, family: str) -> None:
    """The first loss is that of the whole model, whatever dropout its configuration asks for."""
    model = random_model(family, **DROPOUT[family])
    prompts = [[1, 3 + i % 5, 4 + i % 7] for i in range(8)]
    responses = [[5 + i % 6, 3 + i % 9, 2] for i in range(8)]
    expected = 0.0
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            logps = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            expected -= sum(float(logps[2 + i, token]) for i, token in enumerate(response)) / len(prompts)
    model.train()
    with torch.no_grad():  # so that the test can fail: with dropout the model says something else
        noisy = model(input_ids=torch.tensor([prompts[0] + responses[0]])).logits
    assert not torch.allclose(
        noisy, model.eval()(input_ids=torch.tensor([prompts[0] + responses[0]])).logits, atol=1e-3
    )

    columns = {"id": [str(i) for i in range(8)], "prompt_ids": prompts, "response_ids": responses}
    missing = {field.name: pa.nulls(8, field.type) for field in DEMONSTRATIONS if field.name not in columns}
    table = pa.table({**columns, **missing}).select(DEMONSTRATIONS.names).cast(DEMONSTRATIONS)
    write_rows(table, tmp_path / "rows" / "part.parquet", DEMONSTRATIONS)
    training = Optimisation(num_steps=2, batch_size=8, log_every=1, learning_rate=1e-6)
    term = LikelihoodTerm(str(tmp_path / "rows"), Shares(training, 1, 0), 0)
    train(LogProbs(model.train()), [term], training, Worker(str(tmp_path / "stage")))
    assert [row["loss"] for row in metric_rows(tmp_path / "stage")] == pytest.approx([expected] * 2, rel=1e-3)
