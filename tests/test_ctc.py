"""The auxiliary CTC loss on the frames before CIF: its formula, its gradient, its way through batches and files."""

import itertools
import math

import pytest
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.adapters import CFormer
from modeling_blsp_kd.ctc import BLANK, NUM_CTC_CLASSES, ctc_loss
from modeling_blsp_kd.training.batch_counts import first_rows
from processing import BlspKdDataCollator, BlspKdPipeline
from processing.publishing.contents import write_model
from tests.helpers.models import make_model
from tests.helpers.prompts import spoken_prompts
from tests.helpers.trainers import make_trainer

pytestmark = pytest.mark.numerical

WITH_CTC = {"transcript_ce": 1.0, "response_kl": 0.0, "input_kl": 0.0, "ctc": 0.5}


@pytest.fixture
def inputs(processor):
    return spoken_prompts(processor)


def literal_ctc(logits, targets):
    """The negative log of the summed probability of every path that reads as the targets, in float64."""
    probs = logits.double().softmax(-1)
    classes = sorted({BLANK, *targets})  # paths through other classes read otherwise
    total = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(classes, repeat=len(logits)):
        read = [each for each, _ in itertools.groupby(path) if each != BLANK]
        if read == targets:
            total = total + math.prod(probs[frame, each] for frame, each in enumerate(path))
    return -total.log()


def random_logits(num_clips, num_frames):
    return torch.randn(num_clips, num_frames, NUM_CTC_CLASSES, generator=torch.Generator().manual_seed(0))


def test_it_equals_the_sum_over_all_paths_in_value_and_gradient():
    logits = random_logits(3, 6).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    num_frames = torch.tensor([6, 4, 5])
    texts = [[7, 7, 255], [0], [3, 4]]
    transcript_bytes = torch.tensor([text + [-1] * (3 - len(text)) for text in texts])
    loss, num_aligned = ctc_loss(logits, num_frames, transcript_bytes)
    expected = sum(
        literal_ctc(exact[clip, : num_frames[clip]], [byte + 1 for byte in text]) / len(text)
        for clip, text in enumerate(texts)
    )
    assert num_aligned == 3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("text", "num_frames"), [([5, 6, 7], 2), ([5, 5, 5], 4), ([], 4)])
def test_a_clip_without_an_alignment_adds_nothing_and_does_not_count(text, num_frames):
    logits = random_logits(2, 6).requires_grad_()
    transcript_bytes = torch.tensor([[1, 2, -1], text + [-1] * (3 - len(text))])
    loss, num_aligned = ctc_loss(logits, torch.tensor([6, num_frames]), transcript_bytes)
    alone, _ = ctc_loss(logits[:1], torch.tensor([6]), transcript_bytes[:1])
    assert num_aligned == 1
    torch.testing.assert_close(loss, alone, rtol=0, atol=0)
    none, num_aligned = ctc_loss(logits[1:], torch.tensor([num_frames]), transcript_bytes[1:])
    assert (none.item(), num_aligned) == (0.0, 0)
    none.backward()  # DDP waits for a gradient of every weight
    assert not logits.grad.any()


@pytest.mark.parametrize("frame_stride", [1, 3])
def test_the_head_reads_each_clip_as_alone(frame_stride):
    torch.manual_seed(0)
    adapter = CFormer(16, 24, 1, 1, 2, 32, 0.0, "sdpa", frame_stride=frame_stride, has_ctc_head=True)
    lengths = torch.tensor([7, 20, 11])
    mask = torch.arange(20) < lengths[:, None]
    frames = torch.randn(3, 20, 16)
    batch = adapter(frames, mask)
    # The second clip is two windows, the third follows it.
    joined = adapter(frames, mask, windows_per_clip=torch.tensor([1, 2]))
    num_frames = [-(-length // frame_stride) for length in lengths.tolist()]
    assert batch.num_ctc_frames.tolist() == num_frames
    assert joined.num_ctc_frames.tolist() == [num_frames[0], num_frames[1] + num_frames[2]]
    for clip, length in enumerate(num_frames):
        alone = adapter(frames[clip : clip + 1, : lengths[clip]], mask[clip : clip + 1, : lengths[clip]])
        torch.testing.assert_close(batch.ctc_logits[clip, :length], alone.ctc_logits[0], rtol=1e-4, atol=1e-5)
    of_windows = torch.cat([batch.ctc_logits[clip, : num_frames[clip]] for clip in (1, 2)])
    torch.testing.assert_close(joined.ctc_logits[1], of_windows, rtol=1e-4, atol=1e-5)


def test_the_collator_gives_the_bytes_of_the_spoken_rows_lower_cased(processor, rows):
    rows = [{**rows[0], "text": " Zoë RAN "}, {**rows[1], "audio": None}, {**rows[2], "text": "cat"}]
    batch = BlspKdDataCollator(processor, transcript_bytes=True)(rows)
    expected = list("zoë ran".encode())
    assert batch["transcript_bytes"].tolist() == [expected, [*b"cat"] + [-1] * (len(expected) - 3)]
    assert first_rows(batch, 1, processor.audio_token_id)["transcript_bytes"].tolist() == [expected]
    text_only = BlspKdDataCollator(processor, transcript_bytes=True)([{**rows[0], "audio": None}])
    assert text_only["transcript_bytes"].shape[0] == 0
    assert "transcript_bytes" not in BlspKdDataCollator(processor)(rows)


def test_it_trains_what_lies_before_cif_only(processor, rows):
    model = make_model(distillation={**WITH_CTC, "transcript_ce": 0.0, "quantity": 0.0}).train()
    outputs = model(**BlspKdDataCollator(processor, transcript_bytes=True)(rows))
    sum_, count = outputs.loss_parts["ctc"]
    torch.testing.assert_close(outputs.loss, 0.5 * sum_ / count)
    assert outputs.loss_parts["ctc_aligned_share"].tolist() == [3, 3]
    outputs.loss.backward()
    trained = {name for name, weight in model.adapter.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.adapter.named_parameters() if name.startswith(("pre_l", "ctc_head"))}


def test_a_batch_of_text_only_gives_every_weight_a_gradient_of_zero(processor, rows):
    model = make_model(distillation=WITH_CTC).train()
    batch = BlspKdDataCollator(processor, transcript_bytes=True)([{**row, "audio": None} for row in rows])
    model(**batch).loss.backward()
    for name, weight in model.adapter.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


def test_a_batch_without_bytes_says_where_they_come_from(collator, rows):
    with pytest.raises(ValueError, match="transcript_bytes=True"):
        make_model(distillation=WITH_CTC).train()(**collator(rows))


def test_a_subsampler_has_no_such_head():
    with pytest.raises(ValueError, match="ctc=0.5 needs one speech token per text token"):
        make_model(adapter="subsampler", distillation={"response_kl": 1.0, "ctc": 0.5})


def test_the_loss_is_trained_and_evaluated(processor, rows, tmp_path):
    collator = BlspKdDataCollator(processor, transcript_bytes=True)
    model = make_model(distillation={**WITH_CTC, "transcript_ce": 0.0, "quantity": 0.0})
    trainer = make_trainer(tmp_path, processor, collator, model, max_steps=30, learning_rate=0.05)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ctc"] < 0.8 * before["eval_ctc"]
    assert after["eval_loss"] == pytest.approx(0.5 * after["eval_ctc"], rel=1e-6)


@pytest.mark.parametrize("thin", [False, True])
def test_it_may_begin_and_end_between_two_stages(thin, backbones, processor, inputs, tmp_path):
    with_head = BlspKdForCausalLM.from_backbones(
        *backbones, audio_token_id=processor.audio_token_id, thin=thin, distillation=WITH_CTC
    )
    with_head.save_pretrained(tmp_path / "with")
    again = BlspKdForCausalLM.from_pretrained(tmp_path / "with")
    torch.testing.assert_close(again.adapter.ctc_head.weight, with_head.adapter.ctc_head.weight, rtol=0, atol=0)
    without = BlspKdForCausalLM.from_pretrained(tmp_path / "with", distillation={"response_kl": 1.0})
    assert without.adapter.ctc_head is None
    without.save_pretrained(tmp_path / "without")
    begun = BlspKdForCausalLM.from_pretrained(tmp_path / "without", distillation=WITH_CTC)
    assert begun.adapter.ctc_head.weight.isfinite().all() and begun.adapter.ctc_head.weight.requires_grad
    for other in (again, without, begun):  # what it answers does not depend on the head
        torch.testing.assert_close(other(**inputs).logits, with_head(**inputs).logits, rtol=0, atol=0)


def test_what_is_published_has_no_head(processor, inputs, tmp_path):
    model = make_model(distillation=WITH_CTC)
    expected = model(**inputs).logits
    write_model(BlspKdPipeline(model=model, processor=processor), tmp_path, full=False)
    published = BlspKdForCausalLM.from_pretrained(tmp_path)
    assert published.adapter.ctc_head is None and published.config.distillation["ctc"] == 0
    assert not any("ctc_head" in name for name in published.state_dict())
    torch.testing.assert_close(published(**inputs).logits, expected, rtol=0, atol=0)
