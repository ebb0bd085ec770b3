"""BLSP-KD's model: speech encoder, CFormer adapter with CIF, partial LoRA, distillation losses, Trainer.

Importing it registers the model with transformers' Auto classes. Published checkpoints do not need this package: they
carry their own copy of the model files.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from .configuration_blsp_kd import BlspKdConfig
from .modeling_blsp_kd import BlspKdForCausalLM, BlspKdPreTrainedModel

AutoConfig.register(BlspKdConfig.model_type, BlspKdConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    auto_class.register(BlspKdConfig, BlspKdForCausalLM)


def __getattr__(name: str):
    # The trainer imports `datasets` and `accelerate`, which is slow and which inference does not need.
    if name == "BlspKdTrainer":
        from .trainer import BlspKdTrainer

        return BlspKdTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["BlspKdConfig", "BlspKdForCausalLM", "BlspKdPreTrainedModel", "BlspKdTrainer"]
