"""The model: freezing, loading, laying out prompts, and the distillation step against a literal one."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from tests.helpers.literal_losses import literal_divergence, literal_rows
from tests.helpers.models import FAMILIES, SMALL_CFORMER, base_llm, embed_the_transcript, make_config, make_model
from tests.helpers.prompts import spoken_prompts

pytestmark = pytest.mark.numerical

VARIANTS = [
    {"adapter": SMALL_CFORMER},
    {"adapter": SMALL_CFORMER, "plora": True},
    {"adapter": {"type": "subsampler", "bottleneck_dim": 8}},
    {"adapter": {"type": "subsampler", "bottleneck_dim": 8}, "plora": True},
]


def literal_parts(model, batch):
    """Each loss part row by row and token by token, from full logits of the LLM's own forward, without any padding."""
    weights = model.config.distillation
    sums = dict.fromkeys(("response_kl", "input_kl", "quantity", "response_ce", "transcript_ce"), 0.0)
    for row in literal_rows(model, batch):

        def kl(student_position, teacher_position, row=row):
            student, teacher = row.student.logits[student_position], row.teacher.logits[teacher_position]
            return literal_divergence(student, teacher, weights["temperature"])

        for back, position in enumerate(reversed(row.responses), start=1):
            # Counted from the end, response tokens stand at the same places in both prompts.
            sums["response_kl"] += kl(-back - 1, -back - 1)
            sums["response_ce"] -= torch.log_softmax(row.student.logits[-back - 1], -1)[row.labels[position]]
        if model.adapter.one_to_one:
            embeddings = model.get_input_embeddings().weight.double()
            for offset, position in enumerate(row.content):
                sums["input_kl"] += kl(row.place + offset, position)
                scores = row.vectors[offset].double() @ embeddings.T
                sums["transcript_ce"] -= torch.log_softmax(scores, -1)[row.teacher_ids[position]]
            sums["quantity"] += (row.audio.alpha_sum[0] - len(row.content)).abs() / len(row.content)
    return sums


def part_means(output):
    return {name: float(total / count) for name, (total, count) in output.loss_parts.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [SMALL_CFORMER, {"type": "subsampler", "bottleneck_dim": 8}])
def test_distillation_step_equals_a_literal_one(family, adapter, collator, rows):
    one_to_one = adapter["type"] == "cformer"
    weights = {"response_kl": 1.0, "response_ce": 0.3, "temperature": 1.5}
    if one_to_one:
        weights |= {"input_kl": 0.7, "quantity": 2.0, "transcript_ce": 0.2}
    model = make_model(family, adapter=adapter, plora=True, distillation=weights)
    batch = collator(rows)
    output = model(**batch)
    expected = literal_parts(model, batch)
    num_response = int((batch["labels"] != -100).sum())
    num_content = int(batch["teacher_is_content"].sum())
    counts = {"response_kl": num_response, "response_ce": num_response, "quantity": len(rows)}
    counts |= {"input_kl": num_content, "transcript_ce": num_content}
    loss = 0
    for name, weight in weights.items():
        if name != "temperature":
            total, count = output.loss_parts[name]
            assert int(count) == counts[name]
            torch.testing.assert_close(
                float(total), float(torch.as_tensor(expected[name]).detach()), rtol=1e-4, atol=1e-4
            )
            loss += weight * float(total) / counts[name]
    torch.testing.assert_close(float(output.loss.detach()), loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "weights, passes",
    [
        ({"transcript_ce": 1.0, "quantity": 1.0}, []),
        ({"response_ce": 1.0}, ["speech"]),
        ({"response_kl": 1.0, "transcript_ce": 1.0}, ["text", "speech"]),
    ],
)
def test_the_llm_runs_only_where_a_loss_reads_its_states(weights, passes, collator, rows):
    """Both passes ran in every step, also for a recognition warm-up, whose losses read the adapter alone."""
    off = dict.fromkeys(("response_kl", "input_kl", "quantity"), 0.0)
    model = make_model(plora={"lora_dropout": 0.0}, distillation={**off, **weights}).train()
    batch, ran = collator(rows), []

    def note(module, args, options):
        ran.append("text" if options.get("input_ids") is not None else "speech")

    model.language_model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    output = model(**batch)
    assert ran == passes
    output.loss.backward()
    expected = literal_parts(model, batch)
    wanted = {name for name, weight in weights.items() if weight}
    assert wanted == set(output.loss_parts) - {"token_count_accuracy", "token_count_error"}
    for name in wanted:
        total = torch.as_tensor(expected[name]).detach()
        torch.testing.assert_close(float(output.loss_parts[name][0]), float(total), rtol=1e-4, atol=1e-4)

    ran.clear()
    parts = model.eval()(**batch).loss_parts
    assert ran == ["text", "speech"] and {"response_kl", "input_kl"} <= set(parts), "evaluation reports every KL"


def test_the_same_prompt_in_speech_and_text_gives_zero_kl(collator, rows):
    """Speech tokens that are the transcript's own embeddings leave nothing to distil: shifts and positions agree."""
    model = make_model()
    batch = collator(rows)
    embed_the_transcript(model, batch)
    means = part_means(model(**batch))
    assert abs(means["response_kl"]) < 1e-6 and abs(means["input_kl"]) < 1e-6


@pytest.mark.parametrize("options", VARIANTS)
def test_every_trainable_parameter_moves_and_no_frozen_one(options, collator, rows):
    model = make_model(freeze_speech_encoder=False, **options).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    model(**collator(rows)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_llm = name.startswith("language_model") and "lora_" not in name
        assert parameter.requires_grad == (not is_llm and "embed_positions" not in name), name
        # Without input KL nothing is read off speech positions, so only the keys and values of the last layer matter.
        is_unread = (
            not model.adapter.one_to_one and ".layers.1." in name and "k_proj" not in name and "v_proj" not in name
        )
        can_move = parameter.requires_grad and not (is_unread and "lora_" in name)
        assert torch.equal(parameter, before[name]) != can_move, name


def test_frozen_encoder_gets_no_gradient_and_no_dropout(collator, rows):
    model = make_model(speech={"dropout": 0.5}, freeze_speech_encoder=True).train()
    batch = collator(rows)
    first, second = (model(**batch).loss.detach() for _ in range(2))
    assert torch.equal(first, second)
    model(**batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.audio_tower.parameters())
    assert model.audio_tower.training and model.language_model.training, "forward must restore the mode"


@pytest.mark.parametrize("options", VARIANTS)
def test_freezing_survives_loading(options, tmp_path):
    """requires_grad=False set in __init__ is lost by from_pretrained, which made the whole LLM trainable."""
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trainable
    assert all(name.startswith("adapter.") or "lora_" in name for name in trainable)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM])
def test_loaded_model_is_the_saved_one(options, auto_class, tmp_path, processor):
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = spoken_prompts(processor)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_buffer_is_garbage_after_loading(family, tmp_path):
    """Non-persistent buffers came back as raw memory."""
    model = make_model(family, plora=True)
    model.save_pretrained(tmp_path)
    loaded = dict(BlspKdForCausalLM.from_pretrained(tmp_path).named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(loaded[name], buffer), name


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_logits_are_the_llms_bit_for_bit(family, collator, rows):
    model = make_model(family, plora=True)
    torch.manual_seed(3)
    input_ids = torch.randint(3, 200, (2, 11))
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    expected = model.language_model(input_ids=input_ids, attention_mask=mask).logits
    assert torch.equal(base_llm(model)(input_ids=input_ids, attention_mask=mask).logits, expected)
    model(**collator(rows))  # a speech call in between must leave nothing behind
    assert torch.equal(model(input_ids=input_ids, attention_mask=mask).logits, expected)


def test_calls_in_any_order_give_the_same_answer(collator, rows, processor):
    model = make_model(plora=True)
    batch, inputs = collator(rows), spoken_prompts(processor)
    loss, logits = model(**batch).loss, model(**inputs).logits
    copies = copy.deepcopy(batch)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**batch).loss, loss)
    assert all(torch.equal(batch[name], copies[name]) for name in batch), "forward changed its inputs"


def test_forced_counts_equal_a_prompt_already_laid_out(processor):
    model = make_model(plora=True)
    inputs = spoken_prompts(processor)
    counts = torch.tensor([3, 5])
    expanded = model(**inputs, num_speech_tokens=counts)
    audio_token_id = model.config.audio_token_id
    rows = []
    for ids, mask, count in zip(inputs["input_ids"], inputs["attention_mask"], counts):
        row = [[token] * (int(count) if token == audio_token_id else 1) for token in ids[mask.bool()].tolist()]
        rows.append([token for repeated in row for token in repeated])
    length = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    inputs["attention_mask"] = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    laid_out = model(**inputs, num_speech_tokens=counts)
    valid = inputs["attention_mask"].bool()
    assert torch.equal(expanded.logits[valid], laid_out.logits[valid])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_equals_right_padding_and_no_padding(family, processor):
    model = make_model(family, plora=True)
    both = spoken_prompts(processor, durations_s=(0.4, 1.5), instruction="repeat")
    left = model(**both)
    right_inputs = dict(both)
    lengths = both["attention_mask"].sum(1)
    for name in ("input_ids", "attention_mask"):
        right_inputs[name] = torch.stack(
            [torch.roll(row, int(length) - len(row)) for row, length in zip(both[name], lengths)]
        )
    # Unequal text, so that there is padding before expansion too.
    right_inputs["attention_mask"] = torch.nn.functional.pad(right_inputs["attention_mask"], (0, 2))
    right_inputs["input_ids"] = torch.nn.functional.pad(right_inputs["input_ids"], (0, 2))
    right = model(**right_inputs)
    for row in range(2):
        alone = spoken_prompts(processor, durations_s=(0.4, 1.5)[row : row + 1], instruction="repeat")
        num_mel = int(both["input_features_mask"][row].sum())
        alone["input_features"] = both["input_features"][row : row + 1, :, :num_mel]
        alone["input_features_mask"] = both["input_features_mask"][row : row + 1, :num_mel]
        expected = model(**alone).logits[0]
        size = len(expected)
        torch.testing.assert_close(left.logits[row, -size:], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(right.logits[row, :size], expected, rtol=1e-3, atol=1e-3)


def test_labels_without_a_teacher_give_the_llms_cross_entropy(processor):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.7,))
    labels = inputs["input_ids"].clone()
    output = model(**inputs, labels=labels, num_speech_tokens=torch.tensor([4]))
    is_speech = labels[0] == model.config.audio_token_id
    place = int(is_speech.nonzero())
    targets = torch.cat([labels[0, :place], torch.full((4,), -100), labels[0, place + 1 :]])
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), targets[1:])
    torch.testing.assert_close(output.loss, expected)


def test_from_backbones_takes_weights_and_generation_config(backbones, processor):
    speech, text = backbones
    model = BlspKdForCausalLM.from_backbones(
        speech, text, audio_token_id=processor.audio_token_id, adapter=SMALL_CFORMER, plora=True
    )
    llm = AutoModelForCausalLM.from_pretrained(text)
    input_ids = torch.arange(3, 20)[None]
    assert torch.equal(model(input_ids=input_ids).logits, llm(input_ids=input_ids).logits)
    assert model.generation_config.eos_token_id == [2, 7]
    assert model.generation_config.do_sample and model.generation_config.top_k == 11
    assert all((layer.lora_B["plora"].weight == 0).all() for layer in model.plora.layers)
    assert not model.training


@pytest.mark.parametrize("freeze", [True, False])
def test_bfloat16_backbones_train_in_float32(freeze, backbones, processor, collator, rows, tmp_path):
    model = BlspKdForCausalLM.from_backbones(
        *backbones,
        audio_token_id=processor.audio_token_id,
        adapter=SMALL_CFORMER,
        plora=True,
        dtype=torch.bfloat16,
        freeze_speech_encoder=freeze,
    ).train()
    for name, parameter in model.named_parameters():
        is_table = name == "audio_tower.embed_positions.weight"
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16) or is_table, name
    loss = model(**collator(rows)).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = BlspKdForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.generate(**spoken_prompts(processor), max_new_tokens=3).shape[0] == 2


def test_from_backbones_keeps_the_generation_config_when_saved(backbones, processor, tmp_path):
    model = BlspKdForCausalLM.from_backbones(*backbones, audio_token_id=processor.audio_token_id, adapter=SMALL_CFORMER)
    model.save_pretrained(tmp_path)
    assert BlspKdForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 7]


def test_from_backbones_takes_the_encoder_out_of_a_whole_whisper(backbones, processor, tmp_path):
    from transformers import WhisperForConditionalGeneration

    from tests.helpers.models import speech_config

    whisper = WhisperForConditionalGeneration(speech_config())
    whisper.save_pretrained(tmp_path)
    model = BlspKdForCausalLM.from_backbones(
        tmp_path, backbones[1], audio_token_id=processor.audio_token_id, adapter=SMALL_CFORMER
    )
    expected = whisper.model.encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.audio_tower.state_dict().items())


@pytest.mark.parametrize("freeze, frame_stride", [(True, 1), (True, 2), (False, 1)])
def test_token_counts_have_something_to_learn_them(freeze, frame_stride, backbones, processor):
    options = {
        "audio_token_id": processor.audio_token_id,
        "adapter": SMALL_CFORMER | {"num_pre_layers": 0, "frame_stride": frame_stride},
        "freeze_speech_encoder": freeze,
    }
    if freeze and frame_stride == 1:
        with pytest.raises(ValueError, match="nothing would learn the token counts. Set freeze_speech_encoder=False"):
            BlspKdForCausalLM.from_backbones(*backbones, **options)
        return
    model = BlspKdForCausalLM.from_backbones(*backbones, **options).train()
    features = torch.randn(1, model.config.speech_config.num_mel_bins, 40)
    model.get_audio_features(features).alpha_sum.sum().backward()
    learning = {name.split(".")[0] for name, each in model.named_parameters() if each.grad is not None}
    assert learning == ({"adapter"} if freeze else {"audio_tower"})


def test_from_backbones_refuses_what_is_no_whisper(backbones, processor):
    with pytest.raises(ValueError, match="must be of a type among .*, but .* is 'llama'"):
        BlspKdForCausalLM.from_backbones(backbones[1], backbones[1], audio_token_id=processor.audio_token_id)


def test_an_incompatible_checkpoint_is_an_error(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not fit its config: adapter\..* is .* instead of .*\(52 in all\)"):
        BlspKdForCausalLM.from_pretrained(tmp_path, config=make_config(speech={"d_model": 32}))


def test_placeholders_and_audios_must_match(processor):
    model = make_model()
    inputs = spoken_prompts(processor)
    with pytest.raises(ValueError, match=r"hold 2 audio placeholder\(s\).*but 1 audio\(s\) were given"):
        model(**{**inputs, "input_features": inputs["input_features"][:1]})
    with pytest.raises(ValueError, match=r"hold 2 audio placeholder\(s\).*but 0 audio\(s\) were given"):
        model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("audio_token_id", [300, 17])
def test_a_placeholder_without_audio_is_an_error_in_forward_too(audio_token_id):
    """Inside the vocabulary it was read as any word; outside, it ended in a bare index error."""
    model = make_model()
    model.config.audio_token_id = audio_token_id
    with pytest.raises(ValueError, match=r"hold 1 audio placeholder\(s\).*but 0 audio\(s\)"):
        model(input_ids=torch.tensor([[5, audio_token_id, 6]]))


@torch.no_grad()
def test_without_an_audio_token_id_a_model_takes_text_only(processor):
    """The id was 0 by default, which is a real token, so text with that token was refused for lack of audio."""
    model = make_model()
    model.config.audio_token_id = BlspKdConfig().audio_token_id
    text = {"input_ids": torch.tensor([[5, 0, 6]])}
    assert torch.equal(model(**text).logits, model.language_model(**text).logits)
    assert model.generate(**text, max_new_tokens=2, do_sample=False).shape[1] <= 5
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="has no audio_token_id, so no token of a prompt stands for audio. Set"):
            call(**spoken_prompts(processor))


def test_audio_beside_embeddings_or_without_a_mask_is_an_error(processor):
    model = make_model()
    inputs = dict(spoken_prompts(processor))
    with pytest.raises(ValueError, match="pass input_ids.*the placeholder 300 has no embedding"):
        model(inputs_embeds=torch.randn(2, 3, 32), input_features=inputs["input_features"])
    with pytest.raises(ValueError, match="input_features go without speech_embeds"):
        model(**inputs, speech_embeds=torch.randn(2, 3, 32))
    inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (1, 0), value=0)
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match="padded audio prompts needs its attention_mask"):
        model(**inputs)


def test_teacher_and_student_must_hold_the_same_tokens(collator, rows):
    model = make_model()
    batch = collator(rows)
    fewer = batch["labels"].clone()
    fewer[0] = -100
    with pytest.raises(ValueError, match="same response tokens, but hold"):
        model(**{**batch, "labels": fewer})
    with pytest.raises(ValueError, match="same content tokens, but hold"):
        model(**{**batch, "num_speech_tokens": batch["num_speech_tokens"] + 1})
    with pytest.raises(ValueError, match="needs input_features and labels"):
        model(**{name: value for name, value in batch.items() if name != "labels"})


def test_a_batch_without_response_tokens_gives_a_loss_with_a_graph(collator, rows):
    """An all-masked batch returned a loss without a graph, and NaN."""
    model = make_model(distillation={"response_kl": 1.0, "input_kl": 0.0, "quantity": 0.0}).train()
    batch = collator(rows)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["teacher_is_response"] = torch.zeros_like(batch["teacher_is_response"])
    loss = model(**batch).loss
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("options", VARIANTS)
def test_gradient_checkpointing_on_every_part_changes_nothing(options, collator, rows):
    options = {**options, "plora": {"lora_dropout": 0.0} if options.get("plora") else False}
    model = make_model(freeze_speech_encoder=False, **options).train()
    batch = collator(rows)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    expected = gradients()
    model.activation_checkpointing_enable()
    for actual, wanted in zip(gradients(), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_get_audio_features_ignores_no_argument():
    """A misspelt mask was dropped, and padding heard as speech."""
    with pytest.raises(TypeError, match="input_feature_mask"):
        make_model().get_audio_features(torch.randn(1, 80, 50), input_feature_mask=torch.ones(1, 50))
