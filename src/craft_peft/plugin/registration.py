"""Entry into PEFT: the names of our methods, their configs and tuners."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import StackConfig
from .craft_config import CraftConfig
from .lotr_config import LotrConfig
from .superlora_config import SuperLoraConfig
from .tuner import StackTuner

OLDEST_PEFT = Version("0.20.0")
"""Older releases lack the helpers for quantised bases that the adapted layer uses."""


class CraftModel(StackTuner):
    """The tuner of `CraftConfig`; users meet it as `PeftModel.base_model`."""

    prefix = "craft_"


class LotrModel(StackTuner):
    """The tuner of `LotrConfig`."""

    prefix = "lotr_"


class SuperLoraModel(StackTuner):
    """The tuner of `SuperLoraConfig`."""

    prefix = "superlora_"


METHODS: dict[str, tuple[type[StackConfig], type[StackTuner]]] = {
    "craft": (CraftConfig, CraftModel),
    "lotr": (LotrConfig, LotrModel),
    "superlora": (SuperLoraConfig, SuperLoraModel),
}
"""Every method that importing this package adds to PEFT."""


def register_methods() -> None:
    """Make PEFT know our methods. Runs when `craft_peft` is imported; running it again changes nothing.

    Raises:
        ImportError: the installed peft is older than 0.20.
    """
    if Version(version("peft")) < OLDEST_PEFT:
        raise ImportError(f"craft_peft needs peft>={OLDEST_PEFT}, found {version('peft')}: pip install -U peft")
    for name, (config_cls, tuner_cls) in METHODS.items():
        register_method(name, config_cls, tuner_cls)


def register_method(name: str, config_cls: type[StackConfig], tuner_cls: type[StackTuner]) -> None:
    """Make PEFT know a method: one of ours, or one that is defined elsewhere on the same base.

    Args:
        name: in lower case; PEFT and saved adapters know it as the upper-case name.
        config_cls: its config, which sets ``self.peft_type = PeftType[name.upper()]``.
        tuner_cls: its tuner, a subclass that sets ``prefix = name + "_"``.
    """
    peft_type = _peft_type(name.upper())
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)


def _peft_type(name: str) -> PeftType:
    """The member of PEFT's enumeration of that name, added if missing.

    PEFT refuses a method that `PeftType` does not hold, and transformers reads `peft_type.value`, so a plain string
    will not do. The member is made as the `enum` module makes it, which pickle, copy and JSON then understand.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_, member._sort_order_ = name, name, len(PeftType.__members__)
        member.__objclass__ = PeftType
        type.__setattr__(PeftType, name, member)  # first, since the enum refuses to set what is already a member
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]
