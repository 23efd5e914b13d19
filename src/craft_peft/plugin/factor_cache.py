"""Decompositions kept on disk, so that the second adapter on a base model starts at once.

One safetensors file a stack, ranks and decomposition, in the folder that the environment variable ``CRAFT_CACHE`` names
(default: ``craft_peft`` beside ``huggingface`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; ``CRAFT_CACHE=off``: none). Its
name is a hash of every bit of the weights and of all that the factors depend on, so that no other base, not even one
that was trained for one step, finds it. Files that were not used for longest go when there are too many.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..slices import Slices
from ..tucker import Tucker
from ..weights import bytes_of

FORMAT = "craft-peft factors 1"
"""Another number for whatever changes the factors or the file: what was written before is then not found."""

MOST_BYTES = 2 * 1024**3
"""How large the folder may become."""

SUFFIX = ".safetensors"


def key_of(weights: Slices, ranks: Sequence[int], method: str) -> str:
    """A hash of all bits of the weights, and of what is made of them.

    Args:
        weights: of a stack; each is read once.
        ranks: of the decomposition.
        method: how it is computed.
    """
    digest = hashlib.sha256(f"{FORMAT}; {tuple(ranks)}; {method}; {len(weights)}".encode())
    for layer in range(len(weights)):
        weight = weights[layer]
        digest.update(f"; {weight.dtype}; {tuple(weight.shape)}; ".encode())
        digest.update(bytes_of(weight))
        del weight  # before the next one is read
    return digest.hexdigest()


class FactorCache:
    """A folder of decompositions.

    Args:
        folder: where they are; made when something is stored.
        most_bytes: how much may be in it.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self.most_bytes = most_bytes

    @classmethod
    def from_environment(cls) -> FactorCache | None:
        """The one that the environment names; None if it is switched off."""
        named = os.environ.get("CRAFT_CACHE")
        if named is None:
            return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft_peft")
        return None if named.lower() in ("off", "0", "") else cls(Path(named).expanduser())

    def load(self, key: str, shape: Sequence[int], ranks: Sequence[int]) -> Tucker | None:
        """The decomposition with that key, on the CPU; None, with a warning, if its file is not whole.

        Args:
            key: what `key_of` gave.
            shape: of the stack.
            ranks: of the decomposition.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                described = file.metadata() or {}
                tensors = [file.get_tensor(name) for name in _names(len(shape))]
            shapes = [tuple(ranks), *((size, rank) for size, rank in zip(shape, ranks, strict=True))]
            if described != _describe(key, tensors) or [tuple(tensor.shape) for tensor in tensors] != shapes:
                raise ValueError("it does not hold what its name says")
            os.utime(path)  # it was used now
        except (OSError, SafetensorError, ValueError) as error:
            self._warn(f"The cached decomposition '{path}' cannot be used and is computed again: {error}.")
            return None
        return Tucker(tensors[0], tuple(tensors[1:]))

    def store(self, key: str, tucker: Tucker) -> None:
        """Write a decomposition, and remove what was not used for longest if the folder becomes too large.

        A folder that cannot be written is a warning, no error.

        Args:
            key: what `key_of` gave.
            tucker: the decomposition.
        """
        tensors = [tensor.detach().cpu().contiguous() for tensor in (tucker.core, *tucker.factors)]
        content = save(dict(zip(_names(len(tucker.factors)), tensors, strict=True)), _describe(key, tensors))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Beside it and then renamed: nobody reads half a file, however many processes write it.
            with NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as part:
                part.write(content)
            os.replace(part.name, self._path(key))
            self._make_room()
        except OSError as error:
            self._warn(
                f"The decomposition could not be cached in '{self.folder}': {error}. The next adapter computes it "
                "again. Name another folder with the environment variable CRAFT_CACHE, or none with CRAFT_CACHE=off."
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _make_room(self) -> None:
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process made room meanwhile
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        files.sort()
        total = sum(size for _, size, _ in files)
        for _, size, path in files[:-1]:
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _warn(self, sentence: str) -> None:
        warnings.warn(sentence, UserWarning, stacklevel=2)


def _names(modes: int) -> list[str]:
    return ["core", *(f"factor_{mode}" for mode in range(modes))]


def _describe(key: str, tensors: Sequence[Tensor]) -> dict[str, str]:
    """What a file says of itself."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(bytes_of(tensor))
    return {"format": FORMAT, "key": key, "sha256": digest.hexdigest()}
