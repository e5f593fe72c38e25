"""EAGLE-3 draft heads with multi-head latent attention, for `generate(assistant_model=draft)`.

Importing the package registers the head, so that `AutoModel.from_pretrained` needs no `trust_remote_code`. A head that
is loaded from the Hub with its own code never passes through this file.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_eagle3_mla import Eagle3MLAConfig
from .modeling_eagle3_mla import Eagle3MLADraftModel

AutoConfig.register(Eagle3MLAConfig.model_type, Eagle3MLAConfig)
AutoModel.register(Eagle3MLAConfig, Eagle3MLADraftModel)
AutoModelForCausalLM.register(Eagle3MLAConfig, Eagle3MLADraftModel)

__all__ = ["Eagle3MLAConfig", "Eagle3MLADraftModel"]
