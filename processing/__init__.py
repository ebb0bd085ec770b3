"""BLSP-KD's input side: the processor and the training collator.

Importing it registers the processor with `AutoProcessor`.
"""

from transformers import AutoProcessor

from modeling_blsp_kd import BlspKdConfig

from .data_collator import BlspKdDataCollator
from .processing_blsp_kd import BlspKdProcessor

AutoProcessor.register(BlspKdConfig, BlspKdProcessor)

__all__ = ["BlspKdDataCollator", "BlspKdProcessor"]
