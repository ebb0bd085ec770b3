"""One distillation step: the LLM reads text prompts and speech prompts, and what it predicts after both is compared.

Follows arXiv 2405.19041. Runs inside the model's forward, where sharded weights are gathered. Leaves out: the formulas
(`distillation.py`), and counting over batches and processes (`trainer.py`).

Shapes: B prompts, L student and L' teacher length, A audio clips in reading order.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .distillation import linear_cross_entropy, linear_kl_of_rows, postprocess_logits, predicts_next, quantity_loss

# What each loss part is a mean over, in the order of `num_items_in_batch`.
RESPONSE_TOKENS, CONTENT_TOKENS, CLIPS = range(3)
LOSS_PARTS = {
    "response_kl": RESPONSE_TOKENS,
    "input_kl": CONTENT_TOKENS,
    "quantity": CLIPS,
    "response_ce": RESPONSE_TOKENS,
    "transcript_ce": CONTENT_TOKENS,
}
KL_OF = {"response": "response_kl", "content": "input_kl"}


@contextmanager
def frozen(module: nn.Module):
    """Run a frozen module: no gradient, and no dropout whatever the mode of the model around it.

    Not in inference mode: FSDP2 keeps what it gathers there, and may not write to it in the student's forward.
    """
    was_training = [child for child in module.modules() if child.training]
    if was_training:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child in was_training:
            child.training = True


def _gathered_weight(module: nn.Module) -> torch.Tensor:
    """The weight of embeddings or head. As a unit of FSDP2, which accelerate makes of each, a module is gathered by its
    own forward, which the losses go around. FSDP2 frees it again after the backward."""
    if isinstance(module, FSDPModule):
        module.unshard()
    return module.weight


class DistillationStep:
    """The part of [`BlspKdForCausalLM`] that learns."""

    def _distill(
        self, student, teacher, labels, is_speech, audio, teacher_is_content, teacher_is_response, num_items_in_batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One distillation step.

        Args:
            student, teacher (`dict`): what the LLM reads: speech prompts and text prompts.
            labels, is_speech (B, L): response tokens, and speech positions, of the student.
            audio ([`BlspKdAudioOutput`]): what the ears made of the clips.
            teacher_is_content, teacher_is_response (B, L'), num_items_in_batch: see `forward`.

        Returns:
            `tuple`: the weighted loss, and its parts by name, each a tensor of sum and count.
        """
        weights = self.config.distillation
        # Evaluation reports every KL that exists; training computes only what the loss weighs.
        wanted = {name for name in LOSS_PARTS if weights[name]}
        if not self.training:
            wanted |= {"response_kl", "input_kl"} if self.adapter.one_to_one else {"response_kl"}

        # `base_model` is the LLM without its head: vocabulary products are taken at the compared positions only.
        with frozen(self.language_model):
            teacher_states = self.language_model.base_model(**teacher, use_cache=False).last_hidden_state
        with self._partial_lora_at(is_speech):
            student_states = self.language_model.base_model(**student, use_cache=False).last_hidden_state

        predicts_response = predicts_next(labels != -100)
        teacher_predicts_response = predicts_next(teacher_is_response)
        compared = {
            "response": (student_states[predicts_response], teacher_states[teacher_predicts_response]),
            "content": (student_states[is_speech], teacher_states[teacher_is_content]),
        }
        for name in ("response", "content") if self.adapter.one_to_one else ("response",):
            num_student, num_teacher = (len(states) for states in compared[name])
            if num_student != num_teacher:
                raise ValueError(
                    f"Speech and text prompts must hold the same {name} tokens, but hold {num_student} and "
                    f"{num_teacher}. Build both with BlspKdDataCollator."
                )
        response_states = compared["response"][0]
        weight, head_options = self._output_head()

        parts = {}
        compared = {name: states for name, states in compared.items() if KL_OF[name] in wanted}
        if compared:
            # One pass over the vocabulary for the rows of both.
            student_rows, teacher_rows = (torch.cat(states) for states in zip(*compared.values()))
            kl = linear_kl_of_rows(student_rows, teacher_rows, weight, weights["temperature"], **head_options)
            num_rows = [len(states) for states, _ in compared.values()]
            parts |= {KL_OF[name]: rows.sum() for name, rows in zip(compared, kl.split(num_rows))}
        if "quantity" in wanted:
            parts["quantity"] = quantity_loss(audio.alpha_sum, audio.num_speech_tokens)
        if "response_ce" in wanted:
            targets = labels[:, 1:][predicts_response[:, :-1]]
            parts["response_ce"] = linear_cross_entropy(response_states, targets, weight, **head_options)
        if "transcript_ce" in wanted:
            # The LLM's token embeddings double as the output matrix of the recogniser.
            num_slots = audio.pooler_output.shape[1]
            is_token = torch.arange(num_slots, device=labels.device) < audio.num_speech_tokens[:, None]
            targets = teacher["input_ids"][teacher_is_content]
            parts["transcript_ce"] = linear_cross_entropy(
                audio.pooler_output[is_token], targets, _gathered_weight(self.get_input_embeddings())
            )

        counts = torch.stack(
            [
                predicts_response.sum(),
                teacher_is_content.sum(),
                torch.tensor(len(audio.num_speech_tokens), device=labels.device),
            ]
        )
        divisors = counts if num_items_in_batch is None else num_items_in_batch.to(counts.device)
        loss = sum(
            weights[name] * part / divisors[LOSS_PARTS[name]].clamp(min=1)
            for name, part in parts.items()
            if weights[name]
        )
        loss_parts = {
            name: torch.stack([part.detach().float(), counts[LOSS_PARTS[name]].float()]) for name, part in parts.items()
        }
        if audio.alpha_sum is not None:
            miss = (audio.alpha_sum.detach().round().clamp(min=1) - audio.num_speech_tokens).abs()
            num_clips = counts[CLIPS].float()
            loss_parts["token_count_accuracy"] = torch.stack([(miss == 0).sum().float(), num_clips])
            loss_parts["token_count_error"] = torch.stack([miss.sum(), num_clips])
        return loss, loss_parts

    def _output_head(self) -> tuple[torch.Tensor, dict]:
        """The LLM's output head as the losses take it. Read anew in each forward: sharding swaps the weight."""
        head = self.language_model.get_output_embeddings()
        if head.weight.is_meta:
            raise ValueError("The LLM's output head is offloaded, so the losses cannot read it. Keep it on a device.")
        text_config = self.config.get_text_config()
        scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite
        softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
        return _gathered_weight(head), {"lm_head_bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap}

    @torch.no_grad()
    def check_output_head(self):
        """Make sure that the losses see the same logits as the LLM's own forward returns.

        The losses read the output head directly, which is only right while they know all that the LLM does to its
        logits afterwards. The trainer calls this once.

        Raises:
            ValueError: this LLM does something else.
        """
        from peft.utils.integrations import gather_params_ctx  # takes a second, which only training need wait for

        input_ids = torch.arange(4, device=self.device)[None]
        weight, options = self._output_head()
        bias = options.pop("lm_head_bias")
        with frozen(self.language_model):
            own = self.language_model(input_ids=input_ids, use_cache=False).logits.float()
            states = self.language_model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            with gather_params_ctx([weight] if bias is None else [weight, bias], modifier_rank=None):  # under ZeRO-3
                logits = nn.functional.linear(states, weight, bias)
        difference = (postprocess_logits(logits, **options) - own).abs().max()
        tolerance = 1e-3 if own.dtype == torch.float32 else 1e-1
        if not difference <= tolerance * max(1.0, float(own.abs().max())):
            raise ValueError(
                f"{type(self.language_model).__name__} treats its logits in a way that the distillation losses do not "
                f"know (largest difference {float(difference):.3g}); distilling it would be wrong. Known are a scale "
                "(logit_scale, logits_scaling) and soft-capping (final_logit_softcapping)."
            )
