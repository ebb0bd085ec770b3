"""Generated audio, a tokenizer built from scratch, and prompts of both. No network."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from processing import BlspKdProcessor
from processing.chat_templates import FLATTEN_CONTENT

from .models import VOCAB_SIZE

SAMPLING_RATE = 16_000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def clip(duration_s=1.0, seed=0, rate=SAMPLING_RATE) -> np.ndarray:
    """Seconds of a sweeping tone in noise, float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(duration_s * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (200 + 100 * rng.random() + 150 * time) * time)
    return (tone + 0.05 * rng.standard_normal(len(time))).astype(np.float32)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the red cat ran to the river and repeat the words " * 3] * 4, trainer)
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<unused{index}>" for index in range(missing)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_processor():
    """The processor of the fixture, for processes that pytest did not start (`reliability/equivalence_worker.py`)."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|audio|>"]})
    template = FLATTEN_CONTENT.replace("AUDIO_TOKEN", "<|audio|>") + tokenizer.chat_template
    return BlspKdProcessor(WhisperFeatureExtractor(), tokenizer, chat_template=template)


def spoken_prompts(processor, durations_s=(0.5, 1.3), instruction="repeat the words", **kwargs):
    """Processed one-audio prompts."""
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": instruction},
                    {"type": "audio", "audio": clip(duration_s, seed=index)},
                ],
            }
        ]
        for index, duration_s in enumerate(durations_s)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"sampling_rate": SAMPLING_RATE, **kwargs},
    )
