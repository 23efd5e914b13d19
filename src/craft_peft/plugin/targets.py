"""Which modules of a model an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from copy import copy
from difflib import get_close_matches
from operator import eq

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import nn

from ..errors import CraftError
from .config import StackConfig
from .layer import StackedLinear
from .stacks import is_linear, path_pattern, say_once, weight_shape

QUERY_AND_VALUE = {
    **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    # PEFT's table adds the feed-forward layers here; a stack is a projection of the attention.
    "phi": ["q_proj", "v_proj"],
    # Missing in PEFT's table.
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "vit": ["query", "value", "q_proj", "v_proj"],  # before and since transformers 5
    "whisper": ["q_proj", "v_proj"],
}
"""Default target modules by model type; of a type that is not here they are found by `find_query_and_value`."""

SPELLINGS = (("query", "key", "value"), ("q", "k", "v"))
"""What three projections of one attention have in the same place of their names."""

FUSED = re.compile(r"(w_?)?qkv|query_key_value|c_attn|in_proj|att_proj|attn_proj|w_?pack", re.IGNORECASE)
"""What the one projection to query, key and value at once is called, with or without a word as in `qkv_proj`."""

ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
CROSS_ATTENTION = re.compile(r"cross|enc(oder)?_?(dec(oder)?_?)?att(n|ention)", re.IGNORECASE)
"""Where query and value come from two sequences, by the name of the module."""


def set_default_targets(
    config: StackConfig, model: nn.Module, table: Mapping[str, Collection[str]] = QUERY_AND_VALUE
) -> None:
    """Fill in `target_modules` where the user gave none: the attention's query and value.

    Their names are those of the model's type in a table, and else what `find_query_and_value` finds, which is logged.

    Args:
        config: gets the names.
        model: the base model, adapted or not.
        table: names, or a regular expression, by model type.

    Raises:
        CraftError: an unknown model type in which they are not found, or several kinds of them.
    """
    if config.target_modules is not None:
        return
    model_type = _model_type(model)
    names = table[model_type] if model_type in table else find_query_and_value(model)
    config.target_modules = names if isinstance(names, str) else set(names)


def find_query_and_value(model: nn.Module) -> set[str]:
    """Find the query and value projections, fused or apart, among the linear layers of a model's attention blocks.

    Apart, they are two of three modules of one attention whose names differ in query, key and value alone, and whose
    shapes are those of heads: the rows of the query are a multiple of the key's, and value and key agree in rows or
    columns.
    Fused, it is one module with a name of `FUSED` and the rows of all three: three times its columns, or with fewer
    heads for key and value.

    Args:
        model: the base model, adapted or not.

    Returns:
        Names as `target_modules` takes them, which match these modules alone.

    Raises:
        CraftError: nothing is found, or several kinds of it under different names.

    Example:
        >>> from transformers import MPNetConfig, MPNetModel
        >>> model = MPNetModel(MPNetConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9))
        >>> sorted(find_query_and_value(model))
        ['q', 'v']
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for path, projections in _attentions(model):
        for names in _kinds(projections):
            kinds.setdefault(names, []).extend(f"{path}.{name}" for name in names)
    # What reads a second sequence is adapted with the rest where it has the same names, and never by itself.
    kinds = {
        names: paths
        for names, paths in kinds.items()
        if any(not CROSS_ATTENTION.search(_in_block(path)) for path in paths)
    }
    model_type = _model_type(model)
    if len(kinds) != 1:
        where = "; or ".join(_describe(names, paths) for names, paths in kinds.items())
        what = (
            f"Its blocks have several kinds of query and value: {where}." if kinds else describe_linear_modules(model)
        )
        raise CraftError(
            f"Please specify `target_modules` in `peft_config`: the model type {model_type!r} has no default target "
            f"modules. {what}"
        )
    ((names, paths),) = kinds.items()
    say_once(
        f"`target_modules` was not given and the model type {model_type!r} has no default: the query and value "
        f"projections that were found are adapted, {_describe(names, paths)}."
    )
    return _shortest_names(paths, model)


def _model_type(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return str(found or type(model).__name__)


def _attentions(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """The linear modules, by name, of each attention that lies in one of many blocks, and its path."""
    found: dict[str, dict[str, nn.Module]] = {}
    for path, module in linear_modules(model):
        parent, _, name = path.rpartition(".")
        if "*" in path_pattern(parent):
            found.setdefault(parent, {})[name] = module
    for path, projections in found.items():
        if ATTENTION.search(f"{path.rpartition('.')[2]} {type(model.get_submodule(path)).__name__}"):
            yield path, projections


def _kinds(projections: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The names of query and value, or of what is both, among the linear modules of one attention."""
    apart: list[tuple[str, ...]] = []
    for name, module in projections.items():
        for query, *others in SPELLINGS:
            place = rf"(?<![a-z])(w?){query}(?![a-z])"
            key, value = (re.sub(place, rf"\g<1>{other}", name, flags=re.IGNORECASE) for other in others)
            if key != name and key in projections and value in projections:
                of_key, of_value = weight_shape(projections[key]), weight_shape(projections[value])
                if weight_shape(module)[0] % of_key[0] == 0 and any(map(eq, of_key, of_value)):
                    apart.append((name, value))
    # Longformer's `query_global` is one more projection of the same attention, beside `query`.
    plain = [pair for pair in apart if all(pair[0] in other for other, _ in apart)]
    if apart:
        return plain or apart
    return [(name,) for name in projections if _is_fused(name, projections)]


def _is_fused(name: str, projections: Mapping[str, nn.Module]) -> bool:
    if not re.fullmatch(rf"({FUSED.pattern})(_?(proj|lin|linear|layer))?", name, FUSED.flags):
        return False
    rows, columns = weight_shape(projections[name])
    # The output projection reads as many columns as the query has rows; the rest is key and value.
    queries = [weight_shape(module)[1] for other, module in projections.items() if other != name]
    return rows == 3 * columns or any(
        query < rows and (rows - query) % 2 == 0 and query % ((rows - query) // 2) == 0 for query in queries
    )


def _in_block(path: str) -> str:
    """The end of a path: from the block on that the module lies in."""
    return re.split(r"\.\d+\.", path)[-1]


def _describe(names: Collection[str], paths: Collection[str]) -> str:
    where = ", ".join(
        f"'{pattern}'" for pattern in dict.fromkeys(path_pattern(path.rpartition(".")[0]) for path in paths)
    )
    return f"{' and '.join(repr(name) for name in names)} in {where}"


def _shortest_names(paths: Collection[str], model: nn.Module) -> set[str]:
    """The shortest endings of paths that match these projections, in whatever blocks, and no others."""
    keys, wanted = [key for key, _ in model.named_modules()], set(map(path_pattern, paths))
    for length in range(1, max(path.count(".") for path in paths) + 1):
        names = {".".join(path.split(".")[-length:]) for path in paths}
        endings = tuple(f".{name}" for name in names)
        if {path_pattern(key) for key in keys if key in names or key.endswith(endings)} == wanted:
            return names
    return set(paths)


def find_targets(
    config: StackConfig, model: nn.Module, saved: Collection[str] | None = None
) -> list[tuple[str, nn.Module]]:
    """Path and linear module of every target.

    Args:
        config: names the targets; 'all-linear' in it is replaced by what it stands for.
        model: the base model, adapted or not.
        saved: the paths of modules that a saved adapter has tensors for; they are used instead of the config's.

    Raises:
        CraftError: nothing matches; a target has an adapter of another method, or one that is merged into it.
    """
    _maybe_include_all_linear_layers(config, model)
    targets: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if saved is not None:
            key = key.removeprefix("_orig_mod.")  # of a compiled model, as PEFT does
        if not key or key.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, key + ".")
        if check_target_module_exists(config, key) if saved is None else key in saved:
            if isinstance(module, BaseTunerLayer):
                _check_same_method(config, key, module)
            if getattr(module, "merged", False):
                raise CraftError(
                    f"The adapter(s) {module.merged_adapters} are merged into '{key}', so its weight is not the "
                    "pretrained one. Call `unmerge_adapter()` before you add another adapter."
                )
            targets.append((key, module.get_base_layer() if isinstance(module, StackedLinear) else module))
    if not targets:
        raise explain_no_match(config, model)
    return targets


def _check_same_method(config: StackConfig, key: str, layer: BaseTunerLayer) -> None:
    if isinstance(layer, StackedLinear):
        method = layer.adapter_layer_names[0].rpartition("_")[0].upper()
        if method == config.peft_type:
            return
    else:
        method = type(layer).__module__.split(".")[-2].upper().replace("LORA", "LoRA")
    raise CraftError(
        f"The target module '{key}' is already adapted by {method} ({type(layer).__module__}.{type(layer).__name__}), "
        "and an adapter of another method needs the pretrained layer. Merge or remove the other adapter first "
        "(`merge_and_unload()`, `unload()`), or leave the module out with `exclude_modules`."
    )


class NoTargetError(CraftError, getattr(peft, "NoMatchingPeftModuleError", ValueError)):  # type: ignore[misc]
    """Target modules that match nothing; PEFT's own error for it, which peft 0.20 does not have yet, is a base."""


def explain_no_match(config: StackConfig, model: nn.Module) -> NoTargetError:
    """The error for a config that matches no module: names what leaves modules out, and what there is to match."""
    found = {key.rpartition(".")[2] for key, _ in linear_modules(model)}
    names = config.target_modules or ()
    wanted = [names] if isinstance(names, str) else sorted(names)
    close = [match for name in wanted for match in get_close_matches(name, found, n=1)]
    hint = f" Did you mean {', '.join(repr(name) for name in close)}?" if close else ""
    pattern = f" with `layers_pattern={config.layers_pattern!r}`" if config.layers_pattern else ""
    exclusion, layers = ["exclude_modules", "modules_to_save"], ["layers_to_transform", "layers_pattern"]
    reasons = [
        (exclusion, "`exclude_modules` and `modules_to_save` leave out {}."),
        (
            layers,
            f"`layers_to_transform={config.layers_to_transform!r}`{pattern} leaves out {{}}; layers count from 0.",
        ),
        (exclusion + layers, "`exclude_modules`, `modules_to_save` and `layers_to_transform` leave out {}."),
    ]
    for fields, sentence in reasons:
        without = copy(config)
        for field in fields:
            setattr(without, field, None)
        left_out = [repr(key) for key, _ in model.named_modules() if key and check_target_module_exists(without, key)]
        if left_out:
            hint = " " + sentence.format(", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3))
            break
    return NoTargetError(
        f"`target_modules={wanted}` matches no module of {type(model).__name__}.{hint} {describe_linear_modules(model)}"
    )


def describe_linear_modules(model: nn.Module) -> str:
    """A sentence with the names that `target_modules` can hold."""
    names = ", ".join(repr(name) for name in sorted({key.rpartition(".")[2] for key, _ in linear_modules(model)}))
    return f"Its linear modules are called {names or '(there are none)'}."


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every linear layer of a base model, adapted or not."""
    inside: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if key.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):  # the latter: a saved head and its copies
            inside = (*inside, key + ".")
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_linear(layer):
            yield key, layer
