"""A model on a device does what it does on the CPU.

    BLSP_KD_TEST_DEVICE=cuda python -m pytest tests/on_device.py    # or mps, or xpu
    python -m pytest tests/on_device.py                             # on a stand-in for a device without float64

Not collected by a plain `pytest`: `test_devices.py` runs it on the stand-in, `gpu_check.py` on a GPU. On the stand-in,
what computes in float64 runs the same kernels as on the CPU, so results there agree bit for bit. Elsewhere sums of
float32 numbers are taken in another order.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from transformers import TrainingArguments

from modeling_blsp_kd import BlspKdTrainer
from modeling_blsp_kd.cif import continuous_integrate_and_fire
from modeling_blsp_kd.cif_streaming import flush_stream, stream_integrate_and_fire
from modeling_blsp_kd.distillation import linear_kl
from modeling_blsp_kd.speech_windows import tokens_per_window
from processing.demo import hear
from processing.pipeline_blsp_kd import BlspKdPipeline, BlspKdSpeechRecognitionPipeline
from processing.response_generation.engines import RowSampler
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip, spoken_prompts

NAME = os.environ.get("BLSP_KD_TEST_DEVICE", "standin")
if NAME == "standin":
    from tests.helpers.stand_in_device import DEVICE, StandInDevice
else:
    DEVICE = torch.device(NAME, 0)


@pytest.fixture(autouse=True)
def _device():
    with StandInDevice() if NAME == "standin" else nullcontext():
        yield


def to_device(inputs: dict) -> dict:
    return {name: values.to(DEVICE) for name, values in inputs.items()}


def assert_same(ours, expected):
    """Bit for bit on the stand-in."""
    assert_close(ours, expected, 0.0 if NAME == "standin" else {torch.bfloat16: 1e-2}.get(expected.dtype, 1e-5))


def assert_close(ours, expected, tolerance: float = 1e-5):
    assert ours.device == DEVICE
    scale = float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=tolerance * scale, equal_nan=True)


@pytest.mark.skipif(NAME != "standin", reason="of the stand-in")
def test_the_device_has_no_float64():
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device=DEVICE).double()
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, device=DEVICE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="one device"):
        torch.ones(2, device=DEVICE) + torch.ones(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, [4, 9]])
def test_cif_and_its_gradients(dtype, targets):
    torch.manual_seed(0)
    direction, results = torch.randn(2, 9, 8), []
    frames, alphas = torch.randn(2, 300, 8).to(dtype), torch.rand(2, 300) / 20
    mask = torch.arange(300) < torch.tensor([[300], [200]])
    for device in (DEVICE, "cpu"):
        inputs = [values.to(device).requires_grad_() for values in (frames, alphas)]
        counts = None if targets is None else torch.tensor(targets, device=device)
        output = continuous_integrate_and_fire(*inputs, frame_mask=mask.to(device), target_lengths=counts)
        tokens = output.speech_tokens.float()
        loss = (tokens * direction[:, : tokens.shape[1]].to(device)).sum() + output.alpha_sum.sum()
        gradients = torch.autograd.grad(loss, inputs)
        results.append([*output.to_tuple(), *gradients])
    for ours, expected in zip(*results):
        assert_same(ours, expected)


def test_streaming_cif():
    torch.manual_seed(0)
    frames, alphas, results = torch.randn(50, 8), torch.rand(50) / 3, []
    for device in (DEVICE, "cpu"):
        state, parts = None, []
        for start in range(0, 50, 7):
            chunk = [values[start : start + 7].to(device) for values in (frames, alphas)]
            *part, state = stream_integrate_and_fire(*chunk, state)
            parts.append(part)
        parts.append(flush_stream(state))
        results.append([torch.cat(values) for values in zip(*parts)])
    for ours, expected in zip(*results):
        assert_same(ours, expected)


def test_windows():
    arguments = [
        torch.tensor([[2.0, 3.5, 6.0], [1.0, -1.0, -1.0]]),
        torch.tensor([[True] * 3, [True, False, False]]),
        torch.tensor([2, 4, 3]),
        torch.tensor([2, 1]),
    ]
    assert_same(tokens_per_window(*(value.to(DEVICE) for value in arguments)), torch.tensor([1, 2, 1]))


@pytest.mark.parametrize("options", [{}, {"adapter": "subsampler"}, {"plora": True}])
def test_forward_and_training_step(collator, rows, options):
    batch, results = collator(rows), []
    model = make_model(freeze_speech_encoder=False, **options).train()
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad()
        torch.manual_seed(0)
        output = model(**{name: values.to(device) for name, values in batch.items()})
        output.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        results.append({"loss": output.loss.detach(), **gradients})
    expected, ours = results
    assert len(expected) > 10
    for name, values in expected.items():
        if values is not None:
            assert_close(ours[name], values)


def test_long_audio(processor):
    model, waveform = make_model(), clip(33.0)
    inputs = processor(text=processor.audio_token, audio=waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    counts = torch.tensor([40])
    expected = model(**inputs, num_speech_tokens=counts).logits
    assert_close(model.to(DEVICE)(**to_device(inputs), num_speech_tokens=counts.to(DEVICE)).logits, expected)


def test_generate_with_timestamps(processor):
    model, inputs = make_model(), spoken_prompts(processor)
    options = {"max_new_tokens": 8, "return_timestamps": True, "do_sample": False}
    expected = model.generate(**inputs, **options)
    model.to(DEVICE)
    output = model.generate(**to_device(inputs), **options)
    assert torch.equal(output.sequences.cpu(), expected.sequences)
    assert expected.token_timestamps.isfinite().any()
    assert_close(output.token_timestamps, expected.token_timestamps)


def test_sampling(processor):
    model, inputs = make_model().to(DEVICE), to_device(spoken_prompts(processor))
    output = model.generate(**inputs, max_new_tokens=4, do_sample=True, num_beams=2)
    assert output.device == DEVICE and output.shape[1] > inputs["input_ids"].shape[1]


def test_trainer(collator, rows, tmp_path, monkeypatch):
    """Steps with accumulation, logs and an evaluation. Checkpoints are left out: the stand-in has no memory to save."""

    def losses(device):
        monkeypatch.setattr(PartialState, "default_device", torch.device(device))
        monkeypatch.setattr(
            TrainingArguments, "device", property(lambda args: args._setup_devices and torch.device(device))
        )
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=4,
            save_strategy="no",
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = BlspKdTrainer(make_model(plora=True), args, collator, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.model.device == torch.device(device)
        return [log["loss"] for log in trainer.state.log_history if "loss" in log] + [trainer.evaluate()["eval_loss"]]

    expected = losses("cpu")
    assert len(expected) == 5
    assert losses(DEVICE) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("pipeline_class", [BlspKdPipeline, BlspKdSpeechRecognitionPipeline])
def test_pipelines(processor, pipeline_class):
    model = make_model()
    options = {"max_new_tokens": 5, "do_sample": False}
    if pipeline_class is BlspKdSpeechRecognitionPipeline:
        options["return_timestamps"] = "word"
    inputs = {"raw": clip(1.0), "sampling_rate": SAMPLING_RATE}
    expected = pipeline_class(model=model, processor=processor, device="cpu")(inputs, **options)
    pipe = pipeline_class(model=model, processor=processor, device=DEVICE)
    assert next(model.parameters()).device == DEVICE
    assert pipe(inputs, **options) == expected


def test_what_a_model_heard(processor):
    model = make_model()
    expected = hear(model, processor, (clip(1.0), SAMPLING_RATE), transcript="the red cat")
    ours = hear(model.to(DEVICE), processor, (clip(1.0), SAMPLING_RATE), transcript="the red cat")
    assert ours.describe() == expected.describe()


def test_drawing_answers():
    scores = torch.randn(3, 50)
    expected = RowSampler([1, 2, 3])(None, scores)
    assert_same(RowSampler([1, 2, 3])(None, scores.to(DEVICE)), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_linear_kl_and_its_gradient(dtype, tolerance):
    torch.manual_seed(0)
    student, teacher, weight = (torch.randn(size, 64).to(dtype) for size in (40, 40, 500))
    results = []
    for device in (DEVICE, "cpu"):
        hidden = student.to(device).requires_grad_()
        loss = linear_kl(hidden, teacher.to(device), weight.to(device), softcap=30.0)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for ours, expected in zip(*results):
        assert_close(ours, expected, tolerance)


def test_text_alone_is_the_bare_llm_and_speech_is_not(processor):
    model, inputs = make_model(plora=True).to(DEVICE), to_device(spoken_prompts(processor))
    text = torch.tensor([[1, 9, 33, 7]], device=DEVICE)
    with model.plora.at(None):
        bare = model.language_model(input_ids=text).logits
    assert torch.equal(model(input_ids=text).logits.cpu(), bare.cpu())
    with_lora = model(**inputs).logits.cpu()
    for parameter in model.plora.parameters:
        parameter.data.zero_()
    assert not torch.allclose(model(**inputs).logits.cpu(), with_lora)


def test_a_row_does_not_see_the_rest_of_its_batch(processor):
    model = make_model(plora=True).to(DEVICE)
    both = model.generate(**to_device(spoken_prompts(processor)), max_new_tokens=6, do_sample=False)
    alone = model.generate(**to_device(spoken_prompts(processor, (0.5,))), max_new_tokens=6, do_sample=False)
    assert both[0].tolist()[-6:] == alone[0].tolist()[-6:]
