"""CRAFT: fine-tune a pretrained transformer by training a few tens of thousands of numbers shared by all its layers.

A plug-in for Hugging Face PEFT. Importing this package registers its methods, so that `peft.get_peft_model`,
`peft.PeftModel.from_pretrained` and everything around them take a `CraftConfig`, or that of a sibling, `LotrConfig` or
`SuperLoraConfig`. In a process that loads a saved adapter, import this package first.

Example:
    >>> from peft import get_peft_model
    >>> from transformers import RobertaConfig, RobertaForSequenceClassification
    >>> from craft_peft import CraftConfig
    >>> config = RobertaConfig(
    ...     hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=99
    ... )
    >>> base = RobertaForSequenceClassification(config)
    >>> model = get_peft_model(base, CraftConfig(task_type="SEQ_CLS", ranks=(4, 16, 16)))
    >>> sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "craft_" in n)
    1056
"""

from . import command_line as command_line  # first: it silences what the imports of PEFT would say
from .errors import CraftError as CraftError
from .plugin.bank import AdapterBank as AdapterBank
from .plugin.bases import fit_bases as fit_bases
from .plugin.craft_config import CraftConfig as CraftConfig
from .plugin.loading import load_adapter as load_adapter
from .plugin.loading import save_adapter as save_adapter
from .plugin.lotr_config import LotrConfig as LotrConfig
from .plugin.registration import register_methods
from .plugin.superlora_config import SuperLoraConfig as SuperLoraConfig
from .slices import mode_product as mode_product
from .slices import unfold as unfold
from .tucker import Tucker as Tucker
from .tucker import explained_energy as explained_energy
from .tucker import hosvd as hosvd
from .tucker import project as project

register_methods()
