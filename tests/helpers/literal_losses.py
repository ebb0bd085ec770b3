"""Losses written out: a distillation step row by row, without any padding, and divergences entry by entry."""

import math
from types import SimpleNamespace

import torch

from .generation import partial_lora_at

DIVERGENCES = [{"divergence": "reverse"}, *({"divergence": "jsd", "jsd_beta": beta} for beta in (0.1, 0.5, 0.8))]


def states(num_rows=7, width=6, vocabulary=11, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_rows, width, generator=generator).to(dtype) for _ in range(2))
    return student, teacher, torch.randn(vocabulary, width, generator=generator).to(dtype)


def literal_rows(model, batch):
    """Yield for each row of a batch its tokens, and all that the LLM says after its speech and its text prompt.

    `place` is where the speech begins, `content` where the transcript stands in the text prompt, and `responses` where
    response tokens stand in the student's prompt as given. Both outputs have `logits` (L, V) and `hidden_states`, one
    (L, D) per layer, in float64.
    """
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row, :length].tolist()
        labels = batch["labels"][row, :length].tolist()
        teacher_length = int(batch["teacher_attention_mask"][row].sum())
        teacher_ids = batch["teacher_input_ids"][row, :teacher_length]
        num_mel = int(batch["input_features_mask"][row].sum())
        targets = batch["num_speech_tokens"][row : row + 1] if model.adapter.one_to_one else None
        audio = model.get_audio_features(batch["input_features"][row : row + 1, :, :num_mel], None, targets)
        vectors = audio.pooler_output[0]

        place = ids.index(model.config.audio_token_id)
        embed = model.get_input_embeddings()
        before, after = torch.tensor(ids[:place], dtype=torch.long), torch.tensor(ids[place + 1 :])
        embeds = torch.cat([embed(before), vectors, embed(after)])[None]
        is_speech = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
        is_speech[0, place : place + len(vectors)] = True
        with torch.no_grad():
            teacher = model.language_model(input_ids=teacher_ids[None], output_hidden_states=True)
        with partial_lora_at(model, is_speech):
            student = model.language_model(inputs_embeds=embeds, output_hidden_states=True)
        yield SimpleNamespace(
            audio=audio,
            vectors=vectors,
            place=place,
            labels=labels,
            teacher_ids=teacher_ids,
            content=batch["teacher_is_content"][row].nonzero().flatten().tolist(),
            responses=[position for position, label in enumerate(labels) if label != -100],
            student=_exact(student),
            teacher=_exact(teacher),
        )


def _exact(outputs):
    states = [layer[0].double() for layer in outputs.hidden_states]
    return SimpleNamespace(logits=outputs.logits[0].double(), hidden_states=states)


def literal_divergence(student_logits, teacher_logits, temperature, divergence="forward", jsd_beta=0.5):
    """The divergence of two distributions over the vocabulary, entry by entry in float64."""
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher_logits, student_logits))
    m = jsd_beta * p + (1 - jsd_beta) * q

    def kl(one, other):
        return sum(a * torch.log(a / b) for a, b in zip(one, other))

    if divergence == "jsd":
        return jsd_beta * kl(p, m) + (1 - jsd_beta) * kl(q, m)
    return kl(p, q) if divergence == "forward" else kl(q, p)


def literal_weights(kls, options):
    """The weights of the tokens of one answer, token by token."""
    hardest = sorted(range(len(kls)), key=lambda token: -kls[token])
    chosen = hardest[: math.ceil(round(options["hardest_share"] * len(kls), 6))]
    weights = [
        (options["early_weight"] if token < options["early_tokens"] else 1.0) * (token in chosen)
        for token in range(len(kls))
    ]
    return [weight * len(kls) / sum(weights) for weight in weights]


def literal_sums(model, batch):
    """Sums of the parts of the loss with options beyond the paper's, position by position."""
    options = model.config.distillation
    end = model.generation_config.eos_token_id
    sums = dict.fromkeys(("response_kl", "input_kl", "end_of_turn_kl", "layer_alignment"), 0.0)
    for row in literal_rows(model, batch):

        def divergence(student, teacher, row=row):
            logits = row.student.logits[student], row.teacher.logits[teacher]
            return literal_divergence(*logits, options["temperature"], options["divergence"], options["jsd_beta"])

        backs = range(len(row.responses), 0, -1)  # counted from the end, both prompts have the same places
        kls = [divergence(-back - 1, -back - 1) for back in backs]
        sums["response_kl"] += sum(weight * kl for weight, kl in zip(literal_weights(kls, options), kls))
        sums["end_of_turn_kl"] += sum(kl for kl, place in zip(kls, row.responses) if row.labels[place] == end)
        for offset, place in enumerate(row.content):
            sums["input_kl"] += divergence(row.place + offset, place)
            for layer in options["alignment_layers"]:
                student = row.student.hidden_states[layer][row.place + offset]
                teacher = row.teacher.hidden_states[layer][place]
                cosine = 1 - (student @ teacher) / (student.norm() * teacher.norm())
                distance = cosine if options["alignment_distance"] == "cosine" else ((student - teacher) ** 2).mean()
                sums["layer_alignment"] += distance / len(options["alignment_layers"])
    return sums
