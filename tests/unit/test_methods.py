"""Methods are found by their files, and one file is all that a new one takes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from off_policy import example
from toy_methods import tried

from pipelines.methods import table
from prefarena import methods
from prefarena.config import DPO, IPO, MPO, SFT, Entry, OffPolicyMethod, parse_config
from prefarena.methods import discover

TRAINING = {
    "learning_rate": 0.001, "batch_size": 64, "micro_batch_tokens": "auto", "num_steps": None, "num_epochs": 1.0,
    "warmup_steps": 10, "schedule": "cosine", "weight_decay": 0.0, "betas": [0.9, 0.999], "max_grad_norm": 1.0,
    "precision": "float32", "max_bad_steps": 5, "lora": None, "activation_checkpointing": False,
    "checkpoint_every": 200, "log_every": 10,
}  # fmt: skip
SHARED = {
    "demonstration_weight": 0.0, "demonstration_mean": "sequences", "pretraining_weight": 0.0, "training": TRAINING,
}  # fmt: skip
WEIGHTS = {"pair_weight": "none", "max_log_ratio": 2.0, "tail_weight": 1.0, "online": None, "replay": None}
#: What stages hash of a method with its defaults: another one, and finished stages would not be found again.
DUMPED: dict[str, dict[str, Any]] = {
    "mpo": {
        **SHARED, "demonstration_weight": 0.05, "kind": "mpo", "beta": 1.0, "reference": "precomputed",
        "length_normalise": False,
    },
    "dpo": {**SHARED, "kind": "dpo", "beta": 0.1, "label_smoothing": 0.0, "length_normalise": False},
    "ipo": {**SHARED, "kind": "ipo", "tau": 0.1, "length_normalise": False},
    "sft": {**SHARED, "kind": "sft"},
}  # fmt: skip


@pytest.mark.parametrize("method", [MPO(), DPO(), IPO(), SFT()], ids=lambda method: method.kind)
def test_stages_hash_of_settings_what_they_have_always_hashed(method: OffPolicyMethod) -> None:
    """Settings that came later are in the hash where they are set; a config shows them in any case."""
    assert method.address() == DUMPED[method.kind]
    entry = parse_config({"entries": [{"name": "it", "method": {"kind": method.kind}}]}).entries[0]
    assert isinstance(entry, Entry) and entry.model_dump(mode="json")["method"] == DUMPED[method.kind] | WEIGHTS
    weighted = method.model_copy(update={"pair_weight": "ratio"})
    assert weighted.address() == DUMPED[method.kind] | {"pair_weight": "ratio"}


def test_methods_are_found_by_their_files_in_order_and_survive_the_way_to_a_worker() -> None:
    files = sorted(path.stem for path in Path(methods.__file__).parent.glob("*.py") if path.stem != "__init__")
    assert list(discover()) == files and {"dpo", "ipo", "mpo", "sft"} <= set(files)
    for kind, method in discover().items():
        sent = example(method, pretraining_weight=0.5)
        found = pickle.loads(pickle.dumps(sent))
        assert found == sent and type(found) is method and isinstance(found, OffPolicyMethod) and found.kind == kind


def test_what_all_methods_share_is_no_method() -> None:
    with pytest.raises(TypeError, match="abstract"):
        OffPolicyMethod()  # type: ignore[abstract]


def test_descriptions_name_their_papers_and_the_documents_have_the_table() -> None:
    for method in discover().values():
        first = str(method.__doc__).splitlines()[0]
        assert (
            re.search(r"\(arXiv \d{4}\.\d{5}\)", first)
            or method.learns_from == "chosen responses"
            or not method.formula
        ), first
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    held = page.split("<!-- table of methods -->\n")[1].split("\n<!-- end of the table -->")[0]
    assert held == table(), "prefarena methods --table prints what docs/methods.md must hold"


TOY = '''
from typing import Literal

from pydantic import Field

from prefarena.settings.off_policy import Pairwise


class Toy(Pairwise):
    """A toy that raises the margin for ever (arXiv 0000.00000)."""

    kind: Literal["toy"] = "toy"
    strength: float = Field(2.0, gt=0, description="How much it is loved.")

    def pair_losses(self, policy, reference, labels, num_tokens):
        h = self.strength * policy.minus(reference).margin
        return (1 - 2 * labels) * h, h
'''
#: Arguments: the folder of the toy, and one to work in.
USE = """
import json, sys
from pathlib import Path

import prefarena.methods

prefarena.methods.__path__.append(sys.argv[1])

from off_policy import metric_rows, off_policy_job, write_inputs

from pipelines.methods import list_methods
from prefarena.config import OffPolicyMethod, parse_config
from prefarena.errors import UserError
from prefarena.training.run_job import run_job
from prefarena.training.worker import Worker


def parse(**settings):
    return parse_config({"entries": [{"name": "toy", "method": {"kind": "toy", **settings}}]}).entries[0].method


method, said = parse(strength=3, training={"num_steps": 1, "batch_size": 48, "log_every": 1}), []
for mistake in ({"strenght": 1}, {"kind": "toi"}, {"strength": -1}):
    try:
        parse(**mistake)
    except UserError as error:
        said.append(str(error))
folder = Path(sys.argv[2])
run_job(off_policy_job(write_inputs(folder), folder / "toy", method), Worker(str(folder / "toy")))
print(json.dumps({
    "settings": method.model_dump(mode="json"), "is_method": isinstance(method, OffPolicyMethod), "said": said,
    "rows": metric_rows(folder / "toy"), "model": (folder / "toy" / "model").is_dir(), "listed": list_methods(),
}))
"""


def test_a_method_is_one_file(tmp_path: Path) -> None:
    found = tried(TOY, USE, tmp_path)
    assert found["is_method"]
    training = {**TRAINING, "num_steps": 1, "batch_size": 48, "log_every": 1}
    assert found["settings"] == {**SHARED, **WEIGHTS, "training": training, "kind": "toy", "strength": 3.0}
    unknown_key, unknown_kind, out_of_range = found["said"]
    assert unknown_key.endswith("unknown key 'entries.0.method.strenght'; did you mean 'strength'?")
    assert "'toi' is not one of aot, apo_down, " in unknown_kind and unknown_kind.endswith("did you mean 'toy'?")
    assert "entries.0.method.strength: input should be greater than 0" in out_of_range
    (row,) = found["rows"]  # at the reference every margin is 0
    assert row["step"] == 1 and abs(row["loss"]) < 1e-4 and row["grad_norm"] > 0 and found["model"]
    listed = found["listed"]
    assert "\ntoy: A toy that raises the margin for ever (arXiv 0000.00000).\n" in listed
    assert "\n    strength = 2.0    # How much it is loved.\n" in listed


HEAD = "from prefarena.config import DPO\nfrom typing import Literal\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nothing", HEAD, "one class that is an OffPolicy and has a loss is wanted"),
        ("other", HEAD + "class Other(DPO):\n    'Other.'\n", r"Other needs `kind: Literal\['other'\] = 'other'`"),
        (
            "silent",
            HEAD + "class Silent(DPO):\n    kind: Literal['silent'] = 'silent'\n",
            "Silent needs a docstring whose first line names its paper",
        ),
    ],
)
def test_a_file_that_is_no_method_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, says: str
) -> None:
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [str(tmp_path)])
    with pytest.raises(TypeError, match=f"{name}.py: .*{says}"):
        discover()
