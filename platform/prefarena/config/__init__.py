"""Typed configuration: the one home of every default.

A comparison is `entries x seeds` on one `task`. Unknown keys are errors that suggest the right one (see
`load_config`). Every model here is frozen: a resolved configuration is a value, and stages hash it.
"""

from prefarena.config.abilities import Abilities
from prefarena.config.best_of_n import BestOfN
from prefarena.config.comparison import (
    Comparison,
    Entry,
    Evaluation,
    Method,
    OffPolicyMethod,
    OnPolicyMethod,
    Reference,
    draws_responses,
    reward_of,
)
from prefarena.config.devices import Generation, Resources
from prefarena.config.drawn_pairs import Annotator, DrawnPairs
from prefarena.config.loading import DEFAULT_CONFIG, dump_config, load_config, parse_config
from prefarena.config.models import Model, PretrainedModel, ScratchModel
from prefarena.config.tasks import LanguageTask, Task, TextTask
from prefarena.config.tracking import Tracking
from prefarena.methods.dpo import DPO
from prefarena.methods.ipo import IPO
from prefarena.methods.mpo import MPO
from prefarena.methods.on_policy.grpo import GRPO, GRPOTraining
from prefarena.methods.on_policy.rlhf import RLHF, PPOTraining
from prefarena.methods.on_policy.rloo import RLOO, RLOOTraining
from prefarena.methods.sft import SFT
from prefarena.settings.judges import (
    ClassifierJudge,
    Endpoint,
    EndpointJudge,
    EvaluationJudge,
    FunctionJudge,
    GoldJudge,
    JudgeSettings,
    PairwiseJudge,
    RewardModel,
)
from prefarena.settings.off_policy import OffPolicy, Pairwise
from prefarena.settings.on_policy import GroupTraining, OnPolicy, OnPolicyTraining
from prefarena.settings.online import Online
from prefarena.settings.optimisation import LoRA, Optimisation
from prefarena.settings.section import Section

__all__ = [
    "DEFAULT_CONFIG",
    "DPO",
    "GRPO",
    "IPO",
    "MPO",
    "RLHF",
    "RLOO",
    "SFT",
    "Abilities",
    "Annotator",
    "BestOfN",
    "ClassifierJudge",
    "Comparison",
    "DrawnPairs",
    "Endpoint",
    "EndpointJudge",
    "Entry",
    "Evaluation",
    "EvaluationJudge",
    "FunctionJudge",
    "GRPOTraining",
    "Generation",
    "GoldJudge",
    "GroupTraining",
    "JudgeSettings",
    "LanguageTask",
    "LoRA",
    "Method",
    "Model",
    "OffPolicy",
    "OffPolicyMethod",
    "OnPolicy",
    "OnPolicyMethod",
    "OnPolicyTraining",
    "Online",
    "Optimisation",
    "PPOTraining",
    "Pairwise",
    "PairwiseJudge",
    "PretrainedModel",
    "RLOOTraining",
    "Reference",
    "Resources",
    "RewardModel",
    "ScratchModel",
    "Section",
    "Task",
    "TextTask",
    "Tracking",
    "draws_responses",
    "dump_config",
    "load_config",
    "parse_config",
    "reward_of",
]
