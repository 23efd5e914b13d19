"""Pretrained models: where they are, the one way in which they are read, and what their checkpoints did not hold."""

from __future__ import annotations

import contextlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from ..errors import CraftError
from .tasks import Task

PACKAGE = "package:"
SHOWN = 3
_LACKED = "_lacked_by_checkpoint"


def load_base(name: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a pretrained model and put a new head for the task on it.

    Args:
        name: Name on the Hub, or a folder.
        task: Decides the width of the head and the label names in the model's config.

    Returns:
        The model and its tokenizer. What its checkpoint did not hold, `new_modules` and `lacked_keys` tell.

    Raises:
        CraftError: No such folder or name, not a model that can classify text, or a checkpoint that lacks more than
            heads and poolers.
    """
    # Some checkpoints are stored in half precision, in which a head or a whole model does not train; where bfloat16 is
    # used, it is by autocast on these weights.
    options = {"dtype": torch.float32, **_head_fields(task)}
    with _explained(name, " for text classification", "config.json, weights and a tokenizer"):
        model = _read(AutoModelForSequenceClassification, name, options)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_name(name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_tokenizer(name, tokenizer, model)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    if tokenizer.pad_token is None:
        raise CraftError(
            f"The tokenizer of '{name}' has neither a padding token nor an end token, so that texts of unequal length "
            "cannot form a batch. Name one as `pad_token` in its tokenizer_config.json."
        )
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise CraftError(
            f"The tokenizer of '{name}' has {len(tokenizer)} tokens, and the model has embeddings for {vocabulary}. "
            "Use the tokenizer that the model was trained with, or a model whose embeddings were resized for this one."
        )


def load_encoder(name: str) -> PreTrainedModel:
    """Read a pretrained model of any architecture, without a head, and without what its checkpoint does not hold.

    Args:
        name: Name on the Hub, or a folder.

    Returns:
        The model, with its weights in the type in which they are stored.

    Raises:
        CraftError: No such folder or name, nothing that `AutoModel` can read, or a checkpoint that lacks more than
            poolers.
    """
    with _explained(name, "", "config.json and weights"):
        model = _read(AutoModel, name, {})
    for path in new_modules(model):
        setattr(model, path, None)
    return model


def _read(kind: Any, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The one place where weights of a base are read, so that nothing is drawn at random unseen."""
    model, report = kind.from_pretrained(
        resolve_model_name(name),
        # The base may come with a head for another task: that head is replaced, as intended.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    # transformers reads an adapter with its base, and reports on the adapter alone.
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CraftError(
            f"`{name}` holds an adapter (adapter_config.json), which is no base model. Give the model that it was "
            "trained on; `start_from` begins with the adapter of a run."
        )
    lacked = {key: key for key in report["missing_keys"]}
    for key, found, wanted in report["mismatched_keys"]:
        lacked[key] = f"{key} of shape {tuple(wanted)} (they have {tuple(found)})"
    setattr(model, _LACKED, frozenset(lacked))
    wrong = sorted(lacked.keys() - keys_within(lacked, [*head_modules(model), *_modules_after_layers(model)]))
    if wrong:
        raise CraftError(
            f"The weights in `{name}` are not those of a {type(model).__name__} with its config.json: they lack "
            f"{shown([lacked[key] for key in wrong])}. Give a folder with weights that belong to the config."
        )
    return model


def lacked_keys(model: PreTrainedModel) -> frozenset[str]:
    """Names of the tensors that transformers made because the checkpoint did not hold them, or in another shape."""
    return getattr(model, _LACKED, frozenset())


def new_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the modules inside a model's encoder, such as a pooler, that its checkpoint did not hold.

    They start at random like a head, and so they are trained and saved with it.
    """
    return [path for path in _modules_after_layers(model) if keys_within(lacked_keys(model), [path])]


def describe_new_modules(model: PreTrainedModel, name: str) -> list[str]:
    """What a user must know of a model's `new_modules`, in a sentence; nothing where there are none."""
    new = ", ".join(new_modules(model))
    what = "new ones are drawn at random like the head's, trained with it, and saved with the run"
    return [f"`{name}` holds no weights for {new}: {what}."] if new else []


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules of a model that are beside its pretrained encoder."""
    encoder = model.base_model
    return [
        name
        for name, module in model.named_children()
        if encoder is not model and module is not encoder and any(True for _ in module.parameters())
    ]


def is_head_parameter(name: str, model: nn.Module) -> bool:
    """Whether a parameter of a model to train belongs to its head or its new modules, the adapter's wrapper or not."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    name = name.removeprefix("base_model.model.") if isinstance(model, PeftModel) else name
    return not name.startswith(f"{inner.base_model_prefix}.") or bool(keys_within([name], new_modules(inner)))


def keys_within(keys: Iterable[str], paths: Collection[str]) -> set[str]:
    """The names of tensors that lie in one of some modules.

    Example:
        >>> keys_within(["pooler.weight", "pooler_2.weight"], ["pooler"])
        {'pooler.weight'}
    """
    return {key for key in keys if key.startswith(tuple(f"{path}." for path in paths))}


def shown(names: Collection[str]) -> str:
    """Some names in a sentence: the first few, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more


def _modules_after_layers(model: PreTrainedModel) -> list[str]:
    """Paths of an encoder's modules that follow its embeddings and layers, such as a pooler."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    after: list[str] | None = None
    for name, child in model.base_model.named_children():
        if any(isinstance(part, nn.Embedding | nn.ModuleList) for part in child.modules()):
            after = []
        elif after is not None:
            after.append(prefix + name)
    return after or []


@contextlib.contextmanager
def _explained(name: str, purpose: str, needed: str) -> Iterator[None]:
    """Says what a folder must hold when transformers cannot read it; keeps the libraries' own reports to itself."""
    try:
        with quiet_transformers():
            yield
    except CraftError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CraftError(
            f"Could not read a model{purpose} from `{name}`: {first_line(error)} Give a folder that holds {needed}, or "
            "a name on the Hub."
        ) from error


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


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps off the terminal what a user can do nothing about.

    That is transformers' report on new and unused weights (`read_pretrained` judges it), and what the libraries below
    say about each other's coming changes.
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


def first_line(error: Exception) -> str:
    """What an error says, without the lines that explain it to a programmer."""
    line = str(error).strip().partition("\n")[0]
    return line if line.endswith(".") else f"{line}."
