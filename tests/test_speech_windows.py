"""Long clips in windows: cut and joined as a literal loop does, with one integral over all of a clip."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_blsp_kd.adapters import CFormer
from modeling_blsp_kd.speech_windows import (
    is_within,
    join_windows,
    per_clip,
    regroup,
    split_into_windows,
    tokens_per_window,
)
from modeling_blsp_kd.subsampler import Subsampler
from tests.helpers.literal_cif import literal_tokens
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip

pytestmark = pytest.mark.numerical

WINDOW = 100  # mel frames that the tiny encoder takes at once, one second
ADAPTERS = [
    {"type": "cformer", "num_pre_layers": 1, "num_post_layers": 1},
    {"type": "cformer", "num_pre_layers": 2, "num_post_layers": 1, "frame_stride": 3, "attention_window": 5},
    {"type": "subsampler", "bottleneck_dim": 8},
]
ADAPTER_NAMES = ["cformer", "cheaper cformer", "subsampler"]
LAYOUTS = {"waveform": ((), 1, ()), "filter bank": ((), 1, (5,)), "log-mel": ((5,), 2, ())}


def make_short_eared(adapter=ADAPTERS[0], **options):
    """A small model whose encoder hears one second at once."""
    text = {"max_position_embeddings": 4096}
    return make_model(adapter=adapter, speech={"max_source_positions": WINDOW // 2}, text=text, **options)


def mel(num_frames, seed=0):
    return torch.randn(1, 80, num_frames, generator=torch.Generator().manual_seed(seed))


def padded(clips):
    """Clips of different lengths as a batch, with garbage as padding."""
    lengths = torch.tensor([one.shape[-1] for one in clips])
    batch = torch.full((len(clips), 80, int(lengths.max())), 7.0)
    for row, one in zip(batch, clips):
        row[:, : one.shape[-1]] = one[0]
    return batch, is_within(lengths, batch.shape[-1]).long()


def parts_of(features):
    """The windows of one clip as clips of their own, in a batch."""
    return padded(features.split(WINDOW, dim=-1))


def valid(values, mask):
    return torch.cat([row[row_mask] for row, row_mask in zip(values, mask.bool())])


# -- cutting and joining ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [[7], [8, 3], [9, 1], [24, 16, 8], [24, 5, 17, 23], [1, 25]], ids=str)
def test_windows_are_those_of_a_slicing_loop(layout, lengths):
    before, time_axis, after = LAYOUTS[layout]
    longest = max(lengths)
    features = torch.randn(len(lengths), *before, longest, *after, generator=torch.Generator().manual_seed(0))
    mask = is_within(torch.tensor(lengths), longest).long()
    windows, window_mask, windows_per_clip = split_into_windows(features, mask, 8, time_axis)
    if longest <= 8:
        assert windows is features and window_mask is mask and windows_per_clip is None
        return
    expected, counts = [], []
    for row, length in enumerate(lengths):
        starts = range(0, length, 8)
        counts.append(len(starts))
        expected += [features[row].narrow(time_axis - 1, start, min(8, length - start)) for start in starts]
    assert windows_per_clip.tolist() == counts
    assert windows.shape == (len(expected), *before, 8, *after) and window_mask.dtype == mask.dtype
    assert (
        window_mask.tolist() == is_within(torch.tensor([w.shape[time_axis - 1] for w in expected]), 8).long().tolist()
    )
    for window, literal in zip(windows, expected):
        assert torch.equal(window.narrow(time_axis - 1, 0, literal.shape[time_axis - 1]), literal)


@pytest.mark.parametrize("seed", range(3))
def test_regrouping_is_a_loop_over_items(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 6, 2, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    items = [values[row, column] for row in range(4) for column in range(6) if mask[row, column]]
    for sizes in ([len(items)], [1, len(items) - 1], [3, 0, len(items) - 3], [1] * len(items)):
        result = regroup(values, mask, torch.tensor(sizes))
        assert result.shape == (len(sizes), max(sizes), 2)
        rest = iter(items)
        for row, size in enumerate(sizes):
            for column in range(max(sizes)):
                expected = next(rest) if column < size else torch.zeros(2)
                assert torch.equal(result[row, column], expected)


@pytest.mark.parametrize("seed", range(3))
def test_joining_windows_is_a_loop_over_clips(seed):
    generator = torch.Generator().manual_seed(seed)
    windows_per_clip = torch.randint(1, 4, (3,), generator=generator)
    num_windows = int(windows_per_clip.sum())
    mask = is_within(torch.randint(1, 6, (num_windows,), generator=generator), 5)
    values, numbers = torch.randn(num_windows, 5, 2, generator=generator), torch.arange(5).expand(num_windows, -1)
    joined_mask, *joined = join_windows(windows_per_clip, mask, values, numbers)
    for items, of_clips in zip((values, numbers), joined):
        by_clip = zip(items.split(windows_per_clip.tolist()), mask.split(windows_per_clip.tolist()))
        for row, (windows, is_valid) in enumerate(by_clip):
            expected = [item for window, valid in zip(windows, is_valid) for item in window[valid]]
            assert torch.equal(of_clips[row, joined_mask[row]], torch.stack(expected))
    assert join_windows(None, mask, values) == (mask, values)


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_counted_in_the_window_that_completes_them(seed):
    generator = torch.Generator().manual_seed(seed)
    windows_per_clip = torch.randint(1, 4, (3,), generator=generator)
    frames_per_window = torch.randint(1, 9, (int(windows_per_clip.sum()),), generator=generator)
    frames_per_clip = per_clip(frames_per_window, windows_per_clip)
    num_tokens = torch.randint(1, 12, (3,), generator=generator)
    is_token = is_within(num_tokens, int(num_tokens.max()))
    # Halves, so that many fall on a border; the last token of a clip is complete at its end.
    places = (torch.rand(is_token.shape, generator=generator) * frames_per_clip[:, None] * 2).ceil() / 2
    places = places.clamp(min=0.5).masked_fill(~is_token, 1e9).sort(1).values
    places[range(3), num_tokens - 1] = frames_per_clip.float()
    counted = tokens_per_window(places.masked_fill(~is_token, -1.0), is_token, frames_per_window, windows_per_clip)
    expected, window = [], 0
    for row in range(3):
        start = 0
        for _ in range(windows_per_clip[row]):
            end = start + int(frames_per_window[window])
            expected.append(sum(start < float(place) <= end for place in places[row, : num_tokens[row]]))
            start, window = end, window + 1
    assert counted.tolist() == expected
    assert per_clip(counted, windows_per_clip).tolist() == num_tokens.tolist()


# -- through the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speech_padding", ["do_not_pad", "max_length"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=ADAPTER_NAMES)
@pytest.mark.parametrize("num_frames", [101, 300, 357])
@torch.no_grad()
def test_what_attends_hears_each_window_as_a_clip_of_its_own(adapter, num_frames, speech_padding):
    model = make_short_eared(adapter, speech_padding=speech_padding)
    features = mel(num_frames)
    whole = model.get_audio_features(features)
    parts = model.get_audio_features(*parts_of(features))
    assert torch.equal(whole.last_hidden_state[0], valid(parts.last_hidden_state, parts.frame_mask))
    assert whole.frame_mask.all() and whole.frame_mask.shape[1] == parts.frame_mask.sum()
    if adapter["type"] == "cformer":
        assert torch.equal(whole.alphas[0], valid(parts.alphas, parts.frame_mask))
        assert whole.num_speech_tokens == whole.alphas.double().sum().round()
        torch.testing.assert_close(whole.alpha_sum, parts.alpha_sum.sum()[None])
        # Each part rounds its own count.
        most = 0.5 * (1 + len(parts.alpha_sum))
        assert abs(int(whole.num_speech_tokens) - int(parts.num_speech_tokens.sum())) <= most
    else:
        is_token = is_within(parts.num_speech_tokens, parts.pooler_output.shape[1])
        assert torch.equal(whole.pooler_output[0], valid(parts.pooler_output, is_token))


@pytest.mark.parametrize("count", [None, 1, 29, 400])
@torch.no_grad()
def test_one_integral_runs_over_all_windows(count):
    """Speech tokens before the post layers are those of a loop over the joined frames, to the last frame."""
    model = make_short_eared()
    features = mel(357)
    seen = {}
    hooks = [
        model.adapter.cif_proj.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0][0])),
        model.adapter.pre_layers[-1].register_forward_hook(lambda module, args, output: seen.update(frames=output)),
    ]
    parts = model.get_audio_features(*parts_of(features))
    frames = valid(seen["frames"], parts.frame_mask)[:, :-1].double()
    forced = None if count is None else torch.tensor([count])
    audio = model.get_audio_features(features, num_speech_tokens=forced)
    for hook in hooks:
        hook.remove()
    alphas = valid(parts.alphas, parts.frame_mask).double()
    num_tokens = int(alphas.sum().round()) if count is None else count
    assert audio.num_speech_tokens.tolist() == [num_tokens]
    scaled = alphas * num_tokens / alphas.sum()
    expected = literal_tokens(frames, scaled, num_tokens)
    torch.testing.assert_close(seen["tokens"].double(), expected, rtol=1e-5, atol=1e-5)
    # A token is complete where the integral reaches its number, wherever windows end.
    ends = np.concatenate([[0.0], scaled.cumsum(0).numpy()])
    places = np.interp(np.arange(1, num_tokens + 1), ends, np.arange(len(ends)))
    np.testing.assert_allclose(audio.firing_places[0].numpy(), places, rtol=0, atol=1e-3)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=ADAPTER_NAMES)
@torch.no_grad()
def test_a_long_clip_among_short_ones_is_the_same_alone(adapter):
    model = make_short_eared(adapter)
    clips = [mel(length, seed) for seed, length in enumerate([40, 357, 100, 101, 1, 200])]
    together = model.get_audio_features(*padded(clips))
    for row, features in enumerate(clips):
        alone = model.get_audio_features(features)
        assert together.num_speech_tokens[row] == alone.num_speech_tokens[0]
        num_tokens, num_frames = int(alone.num_speech_tokens), alone.frame_mask.shape[1]
        assert together.frame_mask[row].sum() == num_frames
        for name, size in (("pooler_output", num_tokens), ("last_hidden_state", num_frames), ("alphas", num_frames)):
            if getattr(alone, name) is not None:
                values = getattr(together, name)[row, :size]
                torch.testing.assert_close(values, getattr(alone, name)[0, :size], rtol=1e-4, atol=1e-4)
    inputs = {"input_features": padded(clips)[0], "input_features_mask": padded(clips)[1]}
    prompts = torch.tensor([[5, model.config.audio_token_id, 6]] * len(clips))
    logits = model(input_ids=prompts, attention_mask=torch.ones_like(prompts), **inputs).logits
    for row, features in enumerate(clips):
        expected = model(input_ids=prompts[:1], input_features=features).logits[0]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, rtol=1e-3, atol=1e-3)


def split_for_layer(index, frames, length):
    """The stretches that the layer at `index` attends within: every other layer's first is half as long."""
    if length is None:
        return [frames]
    first = length - length // 2 if index % 2 else length
    return [frames[:, :first], *frames[:, first:].split(length, dim=1)] if frames.shape[1] > first else [frames]


def unrolled(model, features):
    """One clip window by window, by hand: (U, D)."""
    adapter = model.adapter
    windows = features.split(WINDOW, dim=-1)
    encoded = [model.audio_tower(window).last_hidden_state for window in windows]
    if isinstance(adapter, Subsampler):
        everything = [adapter(frames, torch.ones(frames.shape[:2], dtype=torch.bool)) for frames in encoded]
        return torch.cat([output.speech_tokens[0] for output in everything])
    stacking, all_frames = adapter.frame_stacking, encoded
    if stacking is not None:
        groups = [
            [
                nn.functional.pad(group, (0, 0, 0, stacking.stride - group.shape[1]))
                for group in frames.split(stacking.stride, 1)
            ]
            for frames in encoded
        ]
        encoded = [torch.cat([stacking.join_proj(group.flatten(1)) for group in window])[None] for window in groups]
    for index, layer in enumerate(adapter.pre_layers):
        stretches = [split_for_layer(index, frames, adapter.attention_window) for frames in encoded]
        encoded = [torch.cat([layer(stretch, None) for stretch in window], dim=1) for window in stretches]
    if stacking is not None:
        shares = [
            stacking.split_proj(joined).reshape(1, -1, frames.shape[2]) for joined, frames in zip(encoded, all_frames)
        ]
        encoded = [frames + share[:, : frames.shape[1]] for frames, share in zip(all_frames, shares)]
    frames = torch.cat(encoded, dim=1)[0].double()
    alphas = torch.sigmoid(frames[:, -1])
    num_tokens = int(alphas.sum().round())
    scaled = alphas * num_tokens / alphas.sum()
    tokens = adapter.cif_proj(literal_tokens(frames[:, :-1], scaled, num_tokens).float())
    groups, first, last, integral = [], 0, 0, 0.0
    for window in encoded:
        start, last = last, last + window.shape[1]
        integral += float(scaled[start:last].sum())
        complete = num_tokens if last == len(frames) else int(integral)
        group = tokens[None, first:complete]
        first = complete
        for layer in adapter.post_layers:
            group = layer(group, None)
        groups.append(adapter.output_proj(group[0]))
    return torch.cat(groups)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=ADAPTER_NAMES)
def test_values_and_gradients_are_those_of_windows_unrolled_by_hand(adapter):
    model = make_short_eared(adapter, freeze_speech_encoder=False)
    features = mel(357).requires_grad_()
    trained = [
        (name, parameter)
        for module in (model.audio_tower, model.adapter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    tokens = model.get_audio_features(features).pooler_output[0]
    expected = unrolled(model, features)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    inputs = [features, *(parameter for _, parameter in trained)]
    gradients = torch.autograd.grad((tokens * direction).sum(), inputs)
    literal = torch.autograd.grad((expected * direction).sum(), inputs)
    for name, gradient, other in zip(["features", *(name for name, _ in trained)], gradients, literal):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(
            gradient / scale, other / scale, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all((window.abs().amax() > 0) for window in gradients[0].split(WINDOW, dim=-1))


def windows_with_alphas(logits, width=16, seed=0):
    """Frames of the windows of one clip, whose CIF weights are sigmoids of the given logits: (N, T, H), (N, T)."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(len(row), width, generator=generator) for row in logits]
    for row, values in zip(frames, logits):
        row[:, -1] = torch.tensor(values)
    mask = is_within(torch.tensor([len(row) for row in logits]), max(map(len, logits)))
    return pad_sequence(frames, batch_first=True), mask


def post_cformer():
    torch.manual_seed(0)
    return CFormer(16, 24, 0, 2, 2, 32, 0.0, "sdpa").eval()


@torch.no_grad()
def test_tokens_that_end_at_every_border_belong_to_the_window_before():
    """Weights of one half: each window makes whole tokens, so the clip is its parts side by side."""
    adapter = post_cformer()
    frames, mask = windows_with_alphas([[0.0] * 8] * 3 + [[0.0] * 4])
    whole = adapter(frames, mask, windows_per_clip=torch.tensor([4]))
    parts = adapter(frames, mask)
    assert parts.num_speech_tokens.tolist() == [4, 4, 4, 2]
    assert whole.num_speech_tokens.tolist() == [14]
    assert whole.firing_places[0].tolist() == list(range(2, 29, 2))
    expected = valid(parts.speech_tokens, is_within(parts.num_speech_tokens, 4))
    torch.testing.assert_close(whole.speech_tokens[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("silent_at", [0, 1, 2, 3])
def test_a_window_of_weight_zero_changes_nothing(silent_at):
    """It completes no token; the integral goes through it, and the tokens around it and all gradients stay."""
    adapter = post_cformer()
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(8, generator=generator).tolist() for _ in range(3)]
    frames, mask = windows_with_alphas(logits)
    silent = torch.randn(1, 8, 16, generator=generator)
    silent[..., -1] = -1000.0
    with_silence = torch.cat([frames[:silent_at], silent, frames[silent_at:]])
    seen_by_layers = []
    hook = adapter.post_layers[0].register_forward_pre_hook(lambda layer, args: seen_by_layers.append(len(args[0])))
    without = adapter(frames, mask, windows_per_clip=torch.tensor([3]))
    output = adapter(with_silence, torch.cat([mask, mask[:1]]), windows_per_clip=torch.tensor([4]))
    hook.remove()
    assert seen_by_layers == [3, 3]  # rows of tokens: none for the silent window, which has none
    torch.testing.assert_close(output.speech_tokens, without.speech_tokens, rtol=1e-5, atol=1e-5)
    shift = (without.firing_places > 8 * silent_at) * 8.0
    torch.testing.assert_close(output.firing_places, without.firing_places + shift)
    gradients, expected = (
        torch.autograd.grad(heard.speech_tokens.square().sum(), adapter.parameters()) for heard in (output, without)
    )
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_clip_of_weight_zero_is_one_empty_token():
    adapter = post_cformer()
    frames, mask = windows_with_alphas([[-1000.0] * 8] * 3)
    output = adapter(frames, mask, windows_per_clip=torch.tensor([3]))
    assert output.num_speech_tokens.tolist() == [1]
    assert output.speech_tokens.shape == (1, 1, 24) and output.speech_tokens.isfinite().all()


# -- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (list, tuple)) else [output]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return output


@pytest.mark.parametrize("adapter", ADAPTERS, ids=ADAPTER_NAMES)
@torch.no_grad()
def test_memory_grows_with_the_length_and_not_with_its_square(adapter):
    model = make_short_eared(adapter)
    largest = []
    for num_windows in (4, 8, 16):
        with LargestTensor() as tensors:
            model.get_audio_features(mel(num_windows * WINDOW))
        largest.append(tensors.numel)
    assert largest[1] <= 2.05 * largest[0] and largest[2] <= 2.05 * largest[1], largest


# -- real length ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_clip_of_65_seconds_through_the_processor_is_its_parts(processor):
    model = make_model(plora=True)
    waveform = clip(65.0)
    inputs = processor("repeat<|audio|>", waveform, sampling_rate=SAMPLING_RATE)
    pieces = np.split(waveform, [30 * SAMPLING_RATE, 60 * SAMPLING_RATE])
    parts = processor("<|audio|>" * 3, pieces, sampling_rate=SAMPLING_RATE)
    assert inputs["input_features"].shape == (1, 80, 6500)
    heard = [
        model.get_audio_features(batch["input_features"], batch["input_features_mask"]) for batch in (inputs, parts)
    ]
    assert heard[0].last_hidden_state.shape[1] == 3250
    assert torch.equal(heard[0].last_hidden_state[0], valid(heard[1].last_hidden_state, heard[1].frame_mask))
    assert torch.equal(heard[0].alphas[0], valid(heard[1].alphas, heard[1].frame_mask))
    count = {"num_speech_tokens": torch.tensor([40])}
    logits = model(**inputs, **count).logits
    num_written = inputs["input_ids"].shape[1]
    assert logits.shape[1] == num_written - 1 + 40
    output = model.generate(**inputs, **count, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    scores = logits[0, -1].clone()
    scores[2] = -torch.inf
    assert output[0, num_written] == scores.argmax()


def test_a_clip_of_ten_minutes_is_processed(processor):
    inputs = processor("<|audio|>", clip(600.0), sampling_rate=SAMPLING_RATE)
    assert inputs["input_features"].shape == (1, 80, 60_000)
    assert inputs["input_features_mask"].shape == (1, 60_000) and inputs["input_features_mask"].all()
