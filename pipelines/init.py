"""`prefarena init`: looks at a model, at data and at what there is to run on, and writes a config to start from."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from pipelines.checks import check_input
from pipelines.init_config import Hardware, Look, Memory, Wanted, config_text
from pipelines.jobs import longest
from pipelines.memory import LARGE
from prefarena.cluster.capacity import share_beside_engine
from prefarena.cluster.needs import Lengths, num_parameters, trainings
from prefarena.config import Comparison, TextTask, parse_config
from prefarena.data.first_rows import look_at_pairs
from prefarena.data.limits import lengths_of
from prefarena.data.tokenization import Tokenizer
from prefarena.errors import UserError
from prefarena.modeling.inspection import inspect_policy
from prefarena.modeling.memory import MemoryNeed
from prefarena.modeling.room import USABLE, share_mib, total_mib
from prefarena.stages import write_text
from prefarena.stores import is_url

_GPU_GIB = 80.0
#: Until something is left out, the lengths of everything are looked at.
_NO_LIMIT = 1 << 30


def init(arguments: argparse.Namespace) -> int:
    """Write a config, and say what was found and what to do next. Returns the exit status."""
    file = Path(arguments.config)
    if file.exists() and not arguments.force:
        raise UserError(f"{file} exists and is not overwritten; give another name, or add --force")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.absolute().parent}; make it, or give another name")
    wanted = _asked(arguments, file)
    print("looking at the model and the data …", flush=True)
    look = look_at(wanted)
    text, fits = _fitting(wanted, look)
    write_text(file, text)
    print(f"model: {look.told_model}\ndata: {look.told_data}")
    if not fits:
        print(
            "None of the layouts tried is predicted to fit in that memory. The config has the smallest of them; "
            "check it with `prefarena doctor`."
        )
    shown = f"'{file}'" if " " in str(file) else str(file)
    print(f"{file} is written. Next: prefarena doctor {shown} and estimate {shown}, then prefarena compare {shown}")
    return 0


def _asked(arguments: argparse.Namespace, file: Path) -> Wanted:
    """Take the answers from the flags, and at a terminal ask for those that are missing."""
    model = arguments.model or _question("--model", "Model (a folder, or a name on the Hugging Face hub)")
    data = arguments.data or _question("--data", "Preference pairs (a file, a folder, or a name on the hub)")
    gpus = (
        arguments.gpus
        if arguments.gpus is not None
        else _number("--gpus", "Number of GPUs to use, on all machines together", 0)
    )
    gib = arguments.gpu_memory
    if gib is None:
        gib = float(_number("--gpu-memory", "Memory of each GPU, in GiB", int(_GPU_GIB))) if gpus else _GPU_GIB
    if gpus < 0 or gib <= 0 or (arguments.cpus or 1) < 1:
        raise UserError("--gpus must be 0 or more, and --gpu-memory and --cpus above 0")
    hardware = Hardware(gpus, gib, arguments.cpus or os.cpu_count() or 1)
    return Wanted(file, _lasting(model), _lasting(data), arguments.split, hardware, arguments.quick)


def _question(flag: str, text: str, default: str = "") -> str:
    """Ask at the terminal. Raises UserError, naming the flag, where there is no terminal."""
    if not sys.stdin.isatty():
        if default:
            return default
        raise UserError(
            f"{flag} is needed, because there is no terminal to ask on; `prefarena init --help` lists all flags"
        )
    answer = ""
    while not answer:
        try:
            answer = input(f"{text}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError:
            raise UserError(f"no answer to {flag}") from None
    return answer


def _number(flag: str, text: str, default: int) -> int:
    answer = _question(flag, text, str(default))
    if not answer.isdigit():
        raise UserError(f"{flag} must be a whole number (got {answer!r})")
    return int(answer)


def _lasting(path: str) -> str:
    """Make a path absolute, so that it is the same from any folder; leave a URL or a name on the hub as it is."""
    found = Path(path).expanduser()
    return path if is_url(path) or not found.exists() else str(found.absolute())


def look_at(wanted: Wanted) -> Look:
    """Look at the model's configuration and tokenizer, and at the first rows of the data. Raises UserError."""
    settings = inspect_policy(wanted.model, scored=True)
    unlimited: dict[str, Any] = {"max_prompt_tokens": _NO_LIMIT, "max_response_tokens": _NO_LIMIT}
    task = TextTask(data=wanted.data, split=wanted.split, **unlimited)
    first = look_at_pairs(task)
    tokenizer = Tokenizer.load(wanted.model, None, task)
    has_template = tokenizer.tokenizer.chat_template is not None
    as_messages = has_template and 2 * first.num_transcripts > first.num_rows
    if as_messages:
        task = task.model_copy(update={"transcripts": "messages"})
        tokenizer = Tokenizer.load(wanted.model, None, task)
    prompts, responses = lengths_of(task, first, tokenizer)
    if not prompts or not responses:
        raise UserError(f"{wanted.data}: none of its first {first.num_rows} rows can be used to train this model")
    limits = [getattr(settings.get_text_config(decoder=True), "max_position_embeddings", None)]
    limits.append(tokenizer.tokenizer.model_max_length)
    return Look(
        settings=settings,
        num_parameters=num_parameters(settings),
        context=min([limit for limit in limits if limit and limit < _NO_LIMIT], default=None),
        has_template=has_template,
        as_messages=as_messages,
        num_rows=first.num_rows,
        all_rows=first.is_whole,
        prompts=tuple(sorted(prompts)),
        responses=tuple(sorted(responses)),
    )


def _fitting(wanted: Wanted, look: Look) -> tuple[str, bool]:
    """The config with the first way of saving memory that is predicted to fit; without one, the last. Checked."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", wanted.file.stem).strip("-.") or "mine"
    for memory in Memory.choices(wanted.hardware):
        text = config_text(wanted, name, look, memory)
        config = parse_config(yaml.safe_load(text), str(wanted.file))
        if found := fits(config, look.settings, wanted.hardware):
            break
    check_input(config)
    return text, found


def fits(config: Comparison, settings: PretrainedConfig, hardware: Hardware) -> bool:
    """Whether every training is predicted to fit into a worker's memory, in its smallest passes, which `auto` may take.

    True where that cannot be predicted, and for small models, which fit anywhere.
    """
    if num_parameters(settings) < LARGE:
        return True
    lengths, needs = Lengths(*longest(config.task)), dict[Any, MemoryNeed | None]()
    for training in trainings(config):
        smallest = min(training.sizes)
        if (training.need, smallest) not in needs:  # several entries may train alike
            needs[training.need, smallest] = training.need(settings, lengths, smallest)
        need = needs[training.need, smallest]
        if need is not None and need.total > _room(config, hardware, training.on_policy):
            return False
    return True


def _room(config: Comparison, hardware: Hardware, on_policy: bool) -> float:
    """Bytes that a training worker may take; if an engine shares its GPU, what the engine leaves."""
    if not hardware.num_gpus:
        return share_mib(total_mib(), 1) * 2**20
    share = share_beside_engine(config) if on_policy else config.resources.gpus_per_worker
    return hardware.gpu_gib * 2**30 * USABLE * share
