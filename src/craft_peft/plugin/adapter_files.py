"""The two files of a saved adapter, read with suspicion: nothing in them is used before it was checked.

Neither file can run code: the config is JSON, the tensors are safetensors (a table of names, types, shapes and places,
then numbers). What they can do is lie, be cut short, or ask for too much memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ..errors import CraftError
from ..weights import bytes_of

MAX_CONFIG_BYTES = 1_000_000
"""A config holds some names and numbers; PEFT's largest have a few kilobytes."""

REACHING = (
    "adapters",
    "megatron_config",
    "prompt_tuning_init_state_dict_path",
    "shadow_model",
    "tokenizer_name_or_path",
)
"""Fields of configs of PEFT's own that make it read other files, or import modules, that the config names."""

PATTERNS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters")
"""Fields in which a string is a regular expression for names of modules."""

MOST_REPEATS = 3
"""With so many repeats, none in another, a match of a name of a hundred letters takes a millisecond at most."""


def read_config(folder: Path) -> PeftConfig:
    """The config of a saved adapter.

    Raises:
        CraftError: no such file, a link that leads out of the folder, too large, no JSON object, an unknown method, an
            unknown field, a field of the wrong type or out of range, or one of `REACHING`.
    """
    path = regular_file(folder, CONFIG_NAME)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CraftError(f"{path} has {path.stat().st_size:,} bytes; a config has at most {MAX_CONFIG_BYTES:,}.")
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CraftError(f"{path} is not a JSON file: {error}. Save the adapter again, or copy it again.") from error
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise CraftError(f"{path} is not the config of an adapter: it has no `peft_type`.")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(found["peft_type"])
    if kind is None:
        known = ", ".join(sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise CraftError(f"{path} has the unknown method {found['peft_type']!r}. Known are {known}.")
    unknown = sorted(set(found) - set(kind.__dataclass_fields__))
    if unknown:
        versions = [
            f"{name} {found.get(field) or 'of an unknown version'} (here {version(name)})"
            for name, field in (("craft-peft", "craft_peft_version"), ("peft", "peft_version"))
        ]
        raise CraftError(
            f"{path} has fields that this version does not know: {', '.join(map(repr, unknown))}. It was written by "
            f"{' and '.join(versions)}. Update what is older here."
        )
    for field, pattern in _patterns(found):
        _check_pattern(path, field, pattern)
    reaching = [name for name in REACHING if found.get(name)]
    if reaching:
        raise CraftError(
            f"{path} has `{reaching[0]}`, which makes PEFT read other files than the adapter's, or import modules. If "
            "you trust where it comes from, load it with `peft.PeftModel.from_pretrained`."
        )
    try:
        return kind(**found)
    except CraftError as error:
        raise CraftError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # PEFT's configs say what is wrong in many ways
        raise CraftError(f"{path} is not a {found['peft_type']} config: {error}") from error


def _patterns(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What PEFT takes for regular expressions: some strings, and the keys of `rank_pattern` and its like."""
    for name, value in fields.items():
        if name in PATTERNS and isinstance(value, str):
            yield name, value
        elif name.endswith("_pattern") and isinstance(value, list | dict):
            yield from ((name, part) for part in value if isinstance(part, str))


def _check_pattern(path: Path, field: str, pattern: str) -> None:
    """Refuse an expression that is none, or that may take for ever: Python looks for a match in exponential time."""
    repeats = re.findall(r"(?<!\\)[*+{]", pattern)
    if len(repeats) > MOST_REPEATS or re.search(r"(?<!\\)\)[*+{]", pattern):
        raise CraftError(
            f"{path}: {field}={pattern[:100]!r} may take for ever to match. Use at most {MOST_REPEATS} of *, + and {{, "
            "and none on a group; or a list of names."
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CraftError(f"{path}: {field}={pattern[:100]!r} is not a regular expression: {error}.") from error


def read_tensors(folder: Path, config: PeftConfig) -> dict[str, Tensor]:
    """The tensors of a saved adapter, on the CPU.

    Raises:
        CraftError: no such file (for a pickle file: how to convert it), a link that leads out of the folder, a file
            that is cut short or no safetensors file, another checksum than the config's, NaN or infinity.

    Cost:
        Memory for the file twice, one pass over it for the checksum and one over the numbers.
    """
    if not (folder / SAFETENSORS_WEIGHTS_NAME).exists() and (folder / WEIGHTS_NAME).exists():
        raise CraftError(
            f"{folder} has its tensors in {WEIGHTS_NAME}, a pickle file, which can run code when it is opened. Only "
            f"{SAFETENSORS_WEIGHTS_NAME} is read. If you trust where it comes from, convert it: "
            f'`safetensors.torch.save_file(torch.load("{WEIGHTS_NAME}", weights_only=True), '
            f'"{SAFETENSORS_WEIGHTS_NAME}")`.'
        )
    path = regular_file(folder, SAFETENSORS_WEIGHTS_NAME)
    try:
        tensors = load_safetensors(path.read_bytes())
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise CraftError(
            f"{path} is not a whole safetensors file: {error}. Save the adapter again, or copy it again."
        ) from error
    expected = getattr(config, "tensors_sha256", None)
    if expected is not None and expected != checksum(tensors):
        raise CraftError(
            f"The tensors in {path} are not those that its config was saved with (their SHA-256 differs). The file was "
            "changed or mixed up; copy the whole folder again."
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CraftError(f"The tensor '{name}' in {path} holds NaN or infinity, so the adapter is of no use.")
    return tensors


def regular_file(folder: Path, name: str) -> Path:
    """The path of a file that lies in a folder; links may lead within it, or within the cache of the Hub.

    Raises:
        CraftError: no such folder or file, not a regular file, or a link that leads elsewhere.
    """
    if not folder.is_dir():
        raise CraftError(f"There is no folder {folder}. Give the folder that `save_pretrained` wrote.")
    path = folder / name
    if not path.exists():
        raise CraftError(f"{folder} holds no {name}. Give the folder that `save_pretrained` wrote.")
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    # In the Hub's cache, models--NAME/snapshots/REVISION holds links into models--NAME/blobs.
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CraftError(f"{path} is a link to {real}, outside the adapter's folder. Only files in it are read.")
    if not stat.S_ISREG(real.stat().st_mode):
        raise CraftError(f"{path} is not a regular file.")
    return real


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

    Example:
        >>> checksum({"a": torch.zeros(2)})[:8] == checksum({"a": torch.zeros(2, 1)})[:8]
        False
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def checksum_in(folder: Path) -> str | None:
    """The checksum of the tensors that lie in a folder, None if there are none."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    return checksum(load_safetensors(path.read_bytes())) if path.is_file() else None
