"""One distillation step, forward and backward, beside its floor, the step without any loss, and the naive form.

The floor runs each part bare: encoder, adapter and LLM (student) forward and backward, the LLM (teacher) forward, and
three products with the vocabulary at the compared positions. Leaves out: data, optimiser, and what the loss is worth.
"""

import torch
from torch.nn.functional import kl_div, linear, log_softmax
from transformers import Qwen2Config, WhisperConfig

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.distillation import predicts_next
from tests.helpers.generation import partial_lora_at

from .measure import OURS, Case

# Batch of clips, their duration, their transcripts' tokens, and tokens of text before, after, and in the response.
BATCH_SIZE, DURATION_S, NUM_CONTENT, NUM_BEFORE, NUM_AFTER, NUM_RESPONSE = 4, 10, 33, 10, 5, 20
LENGTH = NUM_BEFORE + NUM_CONTENT + NUM_AFTER + NUM_RESPONSE
TRAINED = {
    "adapter": {"freeze_speech_encoder": True},
    "encoder and adapter": {"freeze_speech_encoder": False},
    "encoder, adapter and partial LoRA": {"freeze_speech_encoder": False, "plora": True},
}


# A first stage of training, whose losses read the adapter alone.
WARM_UP = {"response_kl": 0.0, "input_kl": 0.0, "quantity": 1.0, "transcript_ce": 1.0}


def cases(small: bool, device, dtype):
    for vocab_size in (300,) if small else (32_000, 151_936):
        for trained, options in TRAINED.items():
            yield _case(small, vocab_size, trained, options, device, dtype)
        yield _warm_up_case(small, vocab_size, device, dtype)


def _model(small: bool, vocab_size: int, options: dict) -> BlspKdForCausalLM:
    encoder_width, num_layers, heads = (16, 1, 2) if small else (384, 4, 6)
    llm_width, num_llm_layers, num_llm_heads = (32, 1, 2) if small else (512, 8, 8)
    speech_config = WhisperConfig(
        d_model=encoder_width,
        encoder_layers=num_layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * encoder_width,
        dropout=0.0,
    )
    text_config = Qwen2Config(
        hidden_size=llm_width,
        intermediate_size=llm_width * 11 // 4,
        num_hidden_layers=num_llm_layers,
        num_attention_heads=num_llm_heads,
        num_key_value_heads=num_llm_heads,
        vocab_size=vocab_size,
    )
    config = BlspKdConfig(
        speech_config=speech_config.to_dict(),
        text_config=text_config.to_dict(),
        audio_token_id=vocab_size,
        **options,
    )
    return BlspKdForCausalLM(config)


def _batch(vocab_size: int, device, dtype) -> dict:
    text = torch.randint(vocab_size, (BATCH_SIZE, LENGTH), device=device)
    place = torch.arange(LENGTH, device=device).expand(BATCH_SIZE, -1)
    is_content = (place >= NUM_BEFORE) & (place < NUM_BEFORE + NUM_CONTENT)
    is_response = place >= LENGTH - NUM_RESPONSE
    placeholder = torch.full((BATCH_SIZE, 1), vocab_size, device=device)
    after = text[:, NUM_BEFORE + NUM_CONTENT :]
    spoken = torch.cat([text[:, :NUM_BEFORE], placeholder, after], dim=1)
    labels = torch.full_like(spoken, -100)
    labels[:, -NUM_RESPONSE:] = text[:, -NUM_RESPONSE:]
    num_mel_frames = 100 * DURATION_S
    return {
        "input_ids": spoken,
        "attention_mask": torch.ones_like(spoken),
        "labels": labels,
        "input_features": torch.randn(BATCH_SIZE, 80, num_mel_frames, device=device, dtype=dtype),
        "input_features_mask": torch.ones(BATCH_SIZE, num_mel_frames, device=device, dtype=torch.long),
        "num_speech_tokens": torch.full((BATCH_SIZE,), NUM_CONTENT, device=device),
        "teacher_input_ids": text,
        "teacher_attention_mask": torch.ones_like(text),
        "teacher_is_content": is_content,
        "teacher_is_response": is_response,
    }


def _case(small: bool, vocab_size: int, trained: str, options: dict, device, dtype) -> Case:
    model = _model(small, vocab_size, options).to(device, dtype).train()
    batch = _batch(vocab_size, device, dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    llm, head = model.language_model.base_model, model.get_output_embeddings().weight
    is_content = batch["teacher_is_content"]
    is_compared = predicts_next(batch["teacher_is_response"])
    num_compared = int(is_compared.sum() + is_content.sum())
    direction = torch.randn(BATCH_SIZE, LENGTH, llm.config.hidden_size, device=device, dtype=dtype)
    states = torch.randn(num_compared, llm.config.hidden_size, device=device, dtype=dtype)
    frame_mask = batch["input_features_mask"][:, ::2].bool()

    def ours():
        return torch.autograd.grad(model(**batch).loss, parameters)

    def student_states(partial_lora: bool):
        with torch.set_grad_enabled(not options["freeze_speech_encoder"]):
            frames = model.audio_tower(batch["input_features"]).last_hidden_state
        speech = model.adapter(frames, frame_mask, batch["num_speech_tokens"]).speech_tokens
        embeds = llm.get_input_embeddings()(batch["teacher_input_ids"])
        embeds = embeds.masked_scatter(is_content[..., None], speech)
        with partial_lora_at(model, is_content if partial_lora else None):
            return llm(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def teacher_states():
        with torch.no_grad():
            return llm(input_ids=batch["teacher_input_ids"], use_cache=False).last_hidden_state

    def without_loss(partial_lora: bool = True):
        teacher_states()
        return torch.autograd.grad(student_states(partial_lora), parameters, direction, allow_unused=True)

    def floor():
        without_loss(partial_lora=False)
        with torch.no_grad():
            for _ in range(2):
                logits = linear(states, head)
            return logits @ head

    def naive():
        teacher, student = (linear(hidden, head).float() / 2 for hidden in (teacher_states(), student_states(True)))
        kl = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="none").sum(-1)
        return torch.autograd.grad(kl[is_compared].mean() + kl[is_content].mean(), parameters, allow_unused=True)

    return Case(
        name=f"{trained} trained, vocabulary {vocab_size}",
        candidates={OURS: ours, "floor": floor, "without loss": without_loss, "full logits": naive},
        memory_unit=("MiB", 2**20),
        repeats=2 if small else 7,
    )


def _warm_up_case(small: bool, vocab_size: int, device, dtype) -> Case:
    """A step that needs no pass of the LLM, beside one that makes both passes all the same."""
    options = {**TRAINED["adapter"], "distillation": WARM_UP}
    model = _model(small, vocab_size, options).to(device, dtype).train()
    batch = _batch(vocab_size, device, dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    llm = model.language_model.base_model

    def ours():
        return torch.autograd.grad(model(**batch).loss, parameters)

    def with_both_passes():
        with torch.no_grad():
            llm(input_ids=batch["teacher_input_ids"], use_cache=False)
        embeds = llm.get_input_embeddings()(batch["teacher_input_ids"]).requires_grad_(True)
        llm(inputs_embeds=embeds, use_cache=False)
        return ours()

    return Case(
        name=f"recognition warm-up, adapter trained, vocabulary {vocab_size}",
        candidates={OURS: ours, "with both passes of the LLM": with_both_passes},
        memory_unit=("MiB", 2**20),
        repeats=2 if small else 7,
    )
