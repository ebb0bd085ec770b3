"""Records of what a model heard have the numbers of model and losses, and a picture that can be read."""

import itertools

import numpy as np
import pytest
import soundfile
import torch

from modeling_blsp_kd.adapters import AdapterOutput
from processing.demo import Hearing, hear, picture, plot_hearing
from tests.helpers.models import VOCAB_SIZE, make_model
from tests.helpers.prompts import SAMPLING_RATE, clip, spoken_prompts

pytestmark = pytest.mark.numerical

INSTRUCTION, TRANSCRIPT = "repeat the words", "the red cat ran"


def spoken(duration_s=0.5, seed=0):
    return clip(duration_s, seed=seed), SAMPLING_RATE


def made_up_hearing(num_tokens, transcript=True, alphas=True, seed=0):
    """A hearing with long and short, likely and unlikely predictions."""
    rng = np.random.default_rng(seed)
    texts = [" ", " a", "\n", "$x$", " extraordinarily", "<|assistant|>"]
    ends_s = np.sort(rng.uniform(0, 0.3 * num_tokens, num_tokens)) if alphas else None
    return Hearing(
        spectrogram=rng.uniform(-70, 0, (80, 30 * num_tokens)),
        duration_s=0.3 * num_tokens + 0.01,
        frame_duration_s=0.02,
        alphas=rng.uniform(0, 1, 15 * num_tokens) if alphas else None,
        token_ends_s=ends_s,
        num_predicted_tokens=num_tokens + 2,
        predictions=[
            [(texts[(token + rank) % 6], 0.9 / (1 + rank + token % 3)) for rank in range(4)]
            for token in range(num_tokens)
        ],
        transcript_tokens=[texts[token % 6] for token in range(num_tokens)] if transcript else None,
        kl_to_text=rng.exponential(1, num_tokens) if transcript else None,
    )


def texts_of(figure):
    return [text for holder in (figure, *figure.axes) for text in holder.texts if text.get_text()]


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits
def test_mean_kl_is_the_input_kl_of_the_loss(family, processor, collator):
    model = make_model(family, plora={"r": 4})
    heard = hear(model, processor, spoken(), INSTRUCTION, TRANSCRIPT)
    row = {"audio": spoken(), "text": TRANSCRIPT, "instruction": INSTRUCTION, "response": "cat"}
    with torch.no_grad():
        total, count = model(**collator([row])).loss_parts["input_kl"]
    assert len(heard.kl_to_text) == count == len(heard.transcript_tokens)
    assert heard.kl_to_text.min() > 1e-4 and heard.kl_to_text.mean() == pytest.approx(float(total / count), rel=1e-4)


def test_kl_is_zero_where_the_ears_make_the_embeddings_of_the_text(processor, monkeypatch):
    model = make_model()
    ids = processor.tokenizer(TRANSCRIPT, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def perfect(hidden_states, frame_mask, num_tokens=None, windows_per_clip=None):
        count = torch.tensor([ids.shape[1]])
        ends = torch.arange(1.0, ids.shape[1] + 1)[None]
        return AdapterOutput(
            speech_tokens=model.get_input_embeddings()(ids),
            num_speech_tokens=count,
            alphas=torch.ones(1, hidden_states.shape[1]),
            alpha_sum=count.float(),
            firing_places=ends,
        )

    monkeypatch.setattr(model.adapter, "forward", perfect)
    heard = hear(model, processor, spoken(), INSTRUCTION, TRANSCRIPT)
    np.testing.assert_allclose(heard.kl_to_text, 0, atol=1e-5)
    assert "".join(heard.transcript_tokens) == TRANSCRIPT


@pytest.mark.parametrize("transcript", [None, TRANSCRIPT])
def test_boundaries_are_firing_places_times_the_frame_duration(processor, transcript):
    model = make_model()
    heard = hear(model, processor, spoken(), transcript=transcript)
    features = {name: torch.from_numpy(value) for name, value in processor.extract_features([spoken()]).items()}
    count = None if transcript is None else torch.tensor([len(heard.transcript_tokens)])
    with torch.no_grad():
        free = model.get_audio_features(**features)
        audio = model.get_audio_features(**features, num_speech_tokens=count)
    np.testing.assert_allclose(heard.token_ends_s, audio.firing_places[0].numpy() * model.frame_duration_s)
    np.testing.assert_array_equal(heard.alphas, audio.alphas[0].numpy())
    assert len(heard.predictions) == int(audio.num_speech_tokens)
    assert heard.num_predicted_tokens == int(free.num_speech_tokens)
    assert heard.duration_s == pytest.approx(0.5) and heard.spectrogram.shape == (80, 51)
    assert heard.kl_to_text is None or transcript is not None


@pytest.mark.parametrize("adapter", ["cformer", "subsampler"])
def test_predictions_are_the_likeliest_of_the_models_own_logits(processor, adapter):
    options = {"adapter": {"type": "subsampler"}} if adapter == "subsampler" else {"plora": {"r": 4}}
    model = make_model(**options)
    heard = hear(model, processor, spoken(), INSTRUCTION, top_k=3)
    inputs = spoken_prompts(processor, (0.5,), INSTRUCTION)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    place = inputs["input_ids"][0].tolist().index(VOCAB_SIZE)
    num_tokens = len(logits) - inputs["input_ids"].shape[1] + 1
    assert len(heard.predictions) == num_tokens > 1
    for row, predictions in zip(logits[place : place + num_tokens], heard.predictions):
        best = row.softmax(-1).topk(3)
        assert [text for text, _ in predictions] == [processor.tokenizer.decode([token]) for token in best.indices]
        assert [probability for _, probability in predictions] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert (heard.alphas is None) == (heard.token_ends_s is None) == (adapter == "subsampler")


def test_hearing_leaves_the_model_as_it_was(processor):
    model = make_model(plora={"r": 4}).train()
    model.audio_tower.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = spoken_prompts(processor, (0.4,))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        model.train()
        model.audio_tower.eval()
    first, second = (hear(model, processor, spoken(), INSTRUCTION, TRANSCRIPT) for _ in range(2))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(first.kl_to_text, second.kl_to_text)  # no dropout
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, logits)


def test_a_file_is_heard_as_its_samples(processor, tmp_path):
    model = make_model()
    samples, _ = spoken()
    soundfile.write(tmp_path / "clip.wav", samples, SAMPLING_RATE, subtype="FLOAT")
    from_file, from_array = hear(model, processor, tmp_path / "clip.wav"), hear(model, processor, samples)
    assert from_file.predictions == from_array.predictions
    np.testing.assert_array_equal(from_file.spectrogram, from_array.spectrogram)


@pytest.mark.parametrize(
    "audio, options, message",
    [
        ("no.wav", {}, r"not found: 'no\.wav'"),
        ((np.zeros(8000), SAMPLING_RATE), {}, "is silent"),
        ((clip(0.01), SAMPLING_RATE), {}, "too short"),
        (spoken(), {"transcript": ""}, "has no tokens"),
        (spoken(20), {}, "Shorten the audio or the text"),
    ],
)
def test_unusable_input_is_an_error_that_says_why(processor, audio, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hear(make_model(), processor, audio, **options)


def test_a_transcript_for_an_adapter_of_a_fixed_rate_is_an_error(processor):
    with pytest.raises(ValueError, match="fixed number of tokens per second"):
        hear(make_model(adapter={"type": "subsampler"}), processor, spoken(), transcript=TRANSCRIPT)


# -- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_tokens, width, kind",
    [
        (1, 3.6, {}),
        (2, 10.0, {"transcript": False}),
        (8, 10.0, {}),  # the last time is named at the very edge
        (14, 10.0, {}),
        (9, 3.6, {}),
        (9, 3.6, {"transcript": False, "alphas": False}),
    ],
)
def test_picture_has_a_column_per_token_and_no_label_covers_another(num_tokens, width, kind):
    figure = plot_hearing(made_up_hearing(num_tokens, **kind), width=width)
    texts = texts_of(figure)
    columns = [text.get_text() for text in texts if text.get_text().startswith("after ")]
    assert columns == [f"after {token + 1}" for token in range(num_tokens)]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    for axes in figure.axes:
        if axes.axison:
            ticks = [
                tick
                for axis in (axes.xaxis, axes.yaxis)
                for tick in axis.get_major_ticks()
                if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
            ]
            labels = [axes.yaxis.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
            boxes += [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
    for first, second in itertools.combinations(boxes, 2):
        overlap = first.intersection(first, second)
        assert overlap is None or min(overlap.width, overlap.height) < 1.5, (first, second)
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1


def test_picture_says_what_is_left_out():
    hearing = made_up_hearing(50)
    figure = plot_hearing(hearing, max_tokens=20)
    texts = [text.get_text().replace("\n", " ") for text in texts_of(figure)]
    assert len([text for text in texts if text.startswith("after ")]) == 20
    (title,) = [text for text in texts if "left out" in text]
    assert f"Shown: the first 20 tokens (up to {hearing.token_ends_s[19]:.2f} s); 30 are left out." in title
    assert "heard as 50 speech tokens, the transcript's number; without it the model makes 52." in title


def test_picture_of_what_a_model_heard(processor):
    heard = hear(make_model(), processor, spoken(), INSTRUCTION, TRANSCRIPT)
    figure = plot_hearing(heard)
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert labels == {"mel", "alpha", "KL", ""}
    boundaries = {line.get_xdata()[0] for axes in figure.axes for line in axes.lines if axes.get_ylabel() == "mel"}
    assert boundaries == set(heard.token_ends_s.tolist())
    assert figure._repr_png_().startswith(b"\x89PNG"), "what a notebook shows"


def test_description_says_what_the_picture_shows():
    hearing = made_up_hearing(3)
    text = hearing.describe(max_tokens=2)
    assert text.startswith("0.91 s of audio heard as 3 speech tokens")
    assert "After token 2 (a)" in text and "1 more tokens are left out." in text
    assert f"KL to the text prompt {hearing.kl_to_text[1]:.2f} nats" in text


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(picture, "is_matplotlib_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[demo\]'"):
        plot_hearing(made_up_hearing(2))
