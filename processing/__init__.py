"""BLSP-KD's input side: the processor, the training collator and the pipelines.

Importing it registers the processor with `AutoProcessor`, and the task "audio-text-to-text" with `pipeline`. The task
"automatic-speech-recognition" remains transformers' own. For it, pass `trust_remote_code=True`, because a saved model
includes its pipelines, or pass `pipeline_class`.
"""

from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from modeling_blsp_kd import BlspKdConfig

from .data_collator import BlspKdDataCollator
from .pipeline_blsp_kd import BlspKdPipeline, BlspKdSpeechRecognitionPipeline
from .processing_blsp_kd import BlspKdProcessor

AutoProcessor.register(BlspKdConfig, BlspKdProcessor)
# transformers has no pipeline of this name, so this replaces none.
PIPELINE_REGISTRY.register_pipeline("audio-text-to-text", BlspKdPipeline, pt_model=AutoModelForCausalLM)
BlspKdConfig.registered_tasks = ("audio-text-to-text",)

__all__ = ["BlspKdDataCollator", "BlspKdPipeline", "BlspKdProcessor", "BlspKdSpeechRecognitionPipeline"]
