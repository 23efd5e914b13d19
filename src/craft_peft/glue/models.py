"""Base models with a fresh classification head, the adapter on top, and trained runs read back."""

from __future__ import annotations

import contextlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ..errors import CraftError
from ..plugin.loading import load_adapter
from .runs import RunFolder
from .tasks import Task

PACKAGE = "package:"
PRECISIONS = ("auto", "float32", "bf16")
PEFT_HEADS = ("classifier", "score")
# Below this width bfloat16 products were no faster than float32 on a processor that has them (measured at 384 and
# 768), so that "auto" keeps the exact type there.
BF16_WIDTH = 768


@dataclass(frozen=True)
class TrainedModel:
    """A finished run in memory.

    Args:
        model: The model with its adapter and head, in evaluation mode.
        tokenizer: The tokenizer it was trained with.
        task: What it predicts, with the label names.
        settings: The resolved settings of the run.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    settings: dict[str, Any]


def load_base(name: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Reads a pretrained model and puts a new head for the task on it.

    Args:
        name: Name on the Hub, or a folder.
        task: Decides the width of the head and the label names in the model's config.

    Returns:
        The model and its tokenizer.

    Raises:
        CraftError: No such folder or name, or not a model that can classify text.
    """
    source = resolve_model_name(name)
    try:
        with quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(
                source,
                # The base may come with a head for another task: that head is replaced, as intended.
                ignore_mismatched_sizes=True,
                # Some checkpoints are stored in half precision, in which a head or a whole model does not train;
                # where bfloat16 is used, it is by autocast on these weights.
                dtype=torch.float32,
                **_head_fields(task),
            )
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise CraftError(
            f"Could not read a model for text classification from `{name}`: {_first_line(error)} Give a folder that "
            "holds config.json, weights and a tokenizer, or a name on the Hub."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def resolve_model_name(name: str) -> str:
    """The base model's name as it is kept in adapters: a folder by its absolute path, a Hub name as it is.

    Args:
        name: As the user gave it; `package:NAME/FOLDER` is a folder in an installed Python package.

    Returns:
        What `from_pretrained` takes.

    Raises:
        CraftError: A path that does not exist, or a package that is not installed.
    """
    path = _in_package(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    # A Hub name is `name` or `owner/name`; anything else can only be meant as a path.
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or path.exists():
        raise CraftError(f"There is no model folder `{name}`. Give an existing folder, or a name on the Hub.")
    return name


def _in_package(place: str) -> Path:
    package, _, folder = place.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise CraftError(
            f"There is no Python package `{package}` to read the model `{PACKAGE}{place}` from. Install it: pip "
            f"install {package.replace('_', '-')}."
        )
    return Path(spec.origin).parent / folder


def portable_model_name(name: str) -> str:
    """A resolved name that means the same on other machines, where there is one: that of a folder in a package.

    Args:
        name: What `resolve_model_name` returned.

    Returns:
        `package:NAME/FOLDER` for a folder among the installed packages, else the name as it is.

    Example:
        >>> portable_model_name("roberta-base")
        'roberta-base'
    """
    for scheme in ("purelib", "platlib"):
        packages = Path(sysconfig.get_path(scheme)).resolve()
        if Path(name).is_relative_to(packages):
            return PACKAGE + Path(name).relative_to(packages).as_posix()
    return name


def adapt(model: PreTrainedModel, config: PeftConfig | None, trains_base: bool) -> nn.Module:
    """Decides what of a model is trained, and adds the adapter if there is one.

    Args:
        model: The base model with its head.
        config: The adapter's config, or None for no adapter.
        trains_base: Without an adapter: whether the pretrained weights are trained too.

    Returns:
        The model to train; the head is always trained, and saved with the adapter.

    Raises:
        CraftError: The config does not fit the model.
    """
    if config is None:
        model.base_model.requires_grad_(trains_base)
        return model
    # PEFT knows heads by two names only; a model with more of a head (DistilBERT's `pre_classifier`) would keep its
    # new layers random and unsaved.
    config.modules_to_save = [name for name in head_modules(model) if name not in PEFT_HEADS] or None
    return add_adapter(model, config)


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """PEFT's `get_peft_model`, quietly, with errors that say what does not fit.

    Args:
        model: A model with the target modules that the config names.
        config: The adapter's config.

    Returns:
        The model with its adapter.

    Raises:
        CraftError: The config does not fit the model.
    """
    try:
        with quiet_transformers():
            return get_peft_model(model, config)
    except CraftError:
        raise
    except (ValueError, TypeError) as error:
        targets = config.target_modules
        shown = sorted(targets) if isinstance(targets, set) else targets
        raise CraftError(
            f"An adapter with target modules {shown} does not fit the model: {_first_line(error)}"
        ) from error


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules of a model that are not part of its pretrained encoder."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def is_head_parameter(name: str, model: nn.Module) -> bool:
    """Whether a parameter of a model to train belongs to its head, the adapter's wrapper or not."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    name = name.removeprefix("base_model.model.") if isinstance(model, PeftModel) else name
    return not name.startswith(f"{inner.base_model_prefix}.")


def load_trained(folder: str | Path, model: str | None = None) -> TrainedModel:
    """Reads a finished run: an adapter folder with its base, or a folder with a whole model.

    Args:
        folder: The output folder of a training run.
        model: The base model, when it is no longer where it was at training.

    Returns:
        The model, its tokenizer and its task.

    Raises:
        CraftError: Not a finished run, or its base cannot be read.
    """
    run = RunFolder(Path(folder))
    metadata = run.read_finished()
    task = Task.restore(metadata["task"])
    if not (run.path / "adapter_config.json").is_file():
        trained, tokenizer = load_base(str(run.path), task)
        return TrainedModel(trained.eval(), tokenizer, task, metadata["settings"])
    base, _ = load_base(model or metadata["settings"]["model"], task)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(run.path)
        adapted = load_adapter(base, run.path)
    base.config.pad_token_id = tokenizer.pad_token_id
    return TrainedModel(adapted, tokenizer, task, metadata["settings"])


def choose_precision(wish: str, width: int) -> str:
    """Decides between float32 and bfloat16.

    Args:
        wish: "float32", "bf16", or "auto": bfloat16 on a GPU that has it, and on a processor that has it in hardware
            when the model is at least 768 wide (below, it was measured to be no faster).
        width: The model's hidden size.

    Returns:
        "float32" or "bf16".

    Raises:
        CraftError: "bf16" on a machine without it.

    Example:
        >>> from craft_peft.glue.models import choose_precision
        >>> choose_precision("float32", 1024)
        'float32'
    """
    if wish not in PRECISIONS:
        raise CraftError(f"Unknown precision `{wish}`. Use one of {', '.join(PRECISIONS)}.")
    if wish == "bf16" and not has_bf16():
        raise CraftError(
            "precision `bf16` was asked for, but this processor (or GPU) has no bfloat16 arithmetic, and emulating it "
            "is slow. Use `auto` or `float32`."
        )
    wide_enough = torch.cuda.is_available() or width >= BF16_WIDTH
    return "bf16" if wish == "bf16" or (wish == "auto" and wide_enough and has_bf16()) else "float32"


def has_bf16() -> bool:
    """Whether the device that will be used has bfloat16 arithmetic in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private names of PyTorch, absent in some versions; without them the answer is no, which is always safe.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def start_from_run(model: nn.Module, folder: str | Path, method: str, base: str) -> None:
    """Gives a model the adapter of a finished run, or its whole encoder, and leaves the head as it is.

    Args:
        model: As `adapt` returned it.
        folder: The run: of the same method, at the same ranks, on the same base.
        method: The method that is trained now.
        base: The base model's resolved name.

    Raises:
        CraftError: Not a finished run, or one of another method, base or shape.
    """
    run = RunFolder(Path(folder))
    settings = run.read_finished()["settings"]
    if (settings["method"], settings["model"]) != (method, base):
        raise CraftError(
            f"The run in {run.path} trained {settings['method']} on {settings['model']}, which cannot be the start of "
            f"{method} on {base}. Start from a run of the same method on the same model."
        )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    heads = tuple(f"{prefix}{name}." for name in head_modules(inner))
    files = sorted(run.path.glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items() if not name.startswith(heads)}
    try:
        if isinstance(model, PeftModel):
            # PEFT wants the head too: it gets the one that the model has.
            set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **saved})
        else:
            model.load_state_dict(saved, strict=False)
    except (ValueError, RuntimeError) as error:
        raise CraftError(
            f"The weights of the run in {run.path} do not fit: {_first_line(error)} Start from a run with the same "
            "ranks and target modules."
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps off the terminal what a user can do nothing about.

    That is transformers' report on new and unused weights (a new head is what was asked for), and what the libraries
    below say about each other's coming changes.
    """
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT sets it right itself.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _head_fields(task: Task) -> dict[str, Any]:
    if task.is_regression:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": task.outputs,
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(task.labels)),
        "label2id": {label: number for number, label in enumerate(task.labels)},
    }


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if line.endswith(".") else f"{line}."
