"""A folder of task files for lm-eval, with data of our own: no hub is asked."""

from __future__ import annotations

import json
from pathlib import Path

_CHOICES = """
task: our_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_ANSWERS = """
task: our_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
_TEXTS = """
task: our_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
_FACTS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Russia": "Moscow", "Portugal": "Lisbon", "Austria": "Vienna",
    "Cuba": "Havana",
}  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """Tasks `our_choices` (four capitals to choose from), `our_answers` (one to be said) and `our_texts`; 12 items."""
    folder.mkdir(parents=True, exist_ok=True)
    capitals, rows = list(_FACTS.values()), []
    for place, (country, capital) in enumerate(_FACTS.items()):
        others = [capitals[(place + step) % len(capitals)] for step in (1, 4, 7)]
        at = place % 4
        choices = [f" {name}" for name in [*others[:at], capital, *others[at:]]]
        question = f"The capital of {country} is"
        rows.append({"question": question, "choices": choices, "label": at, "answer": f" {capital}"})
    data = folder / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("choices", _CHOICES), ("answers", _ANSWERS), ("texts", _TEXTS)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return folder
