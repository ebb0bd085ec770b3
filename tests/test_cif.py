"""CIF against a literal float64 loop, and the laws that any CIF must keep."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_blsp_kd.cif import continuous_integrate_and_fire
from modeling_blsp_kd.cif_streaming import flush_stream, stream_integrate_and_fire
from tests.helpers.literal_cif import literal_cif, literal_tokens

pytestmark = pytest.mark.numerical


def random_case(seed, batch_size=4, num_frames=23, num_channels=5, max_tokens=12):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(batch_size, num_frames, num_channels, generator=generator)
    alphas = torch.rand(batch_size, num_frames, generator=generator) + 1e-3
    lengths = torch.randint(1, num_frames + 1, (batch_size,), generator=generator)
    targets = torch.randint(1, max_tokens + 1, (batch_size,), generator=generator)
    return frames, alphas, torch.arange(num_frames) < lengths[:, None], targets


def assert_equals_loop(frames, alphas, mask, targets, check_gradients=True):
    frames, alphas = frames.clone().requires_grad_(), alphas.clone().requires_grad_()
    output = continuous_integrate_and_fire(frames, alphas, mask, targets)
    exact_frames = frames.detach().double().requires_grad_()
    exact_alphas = alphas.detach().double().requires_grad_()
    expected = literal_cif(exact_frames, exact_alphas, mask, targets)
    direction = torch.randn(output.speech_tokens.shape, generator=torch.Generator().manual_seed(0))
    total = 0
    for row, tokens in enumerate(expected):
        torch.testing.assert_close(output.speech_tokens[row, : len(tokens)].double(), tokens, rtol=1e-6, atol=2e-6)
        assert (output.speech_tokens[row, len(tokens) :] == 0).all()
        total = total + (tokens * direction[row, : len(tokens)]).sum()
    if check_gradients:
        (output.speech_tokens * direction).sum().backward()
        total.backward()
        torch.testing.assert_close(frames.grad.double(), exact_frames.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alphas.grad.double(), exact_alphas.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_literal_loop_in_values_and_gradients(seed):
    assert_equals_loop(*random_case(seed))


@pytest.mark.parametrize("max_tokens", [1, 90])
def test_one_token_and_more_tokens_than_frames(max_tokens):
    """The authors' loop and FunASR lose tokens when one frame fires several."""
    frames, alphas, mask, _ = random_case(3)
    targets = torch.full((4,), max_tokens)
    assert_equals_loop(frames, alphas, mask, targets)


def test_one_huge_alpha_among_zeros():
    frames = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    alphas = torch.zeros(2, 9)
    alphas[0, 4], alphas[1, 0], alphas[1, 8] = 1e4, 1e-4, 1.0
    mask = torch.ones(2, 9, dtype=torch.bool)
    targets = torch.tensor([7, 2])
    assert_equals_loop(frames, alphas, mask, targets, check_gradients=False)
    tokens = continuous_integrate_and_fire(frames, alphas, mask, targets).speech_tokens
    torch.testing.assert_close(tokens[0], frames[0, 4].expand(7, 3), rtol=1e-6, atol=1e-6)


def test_sums_that_land_on_a_boundary():
    """Quarters add up exactly: each token ends exactly where a frame ends."""
    frames = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))
    alphas = torch.full((1, 12), 0.25)
    mask = torch.ones(1, 12, dtype=torch.bool)
    output = continuous_integrate_and_fire(frames, alphas, mask)
    assert output.num_speech_tokens.tolist() == [3]
    torch.testing.assert_close(output.speech_tokens[0], frames[0].view(3, 4, 3).mean(1))
    assert output.firing_places.tolist() == [[4.0, 8.0, 12.0]]
    assert_equals_loop(frames, alphas, mask, torch.tensor([3]), check_gradients=False)


@pytest.mark.parametrize("seed", range(3))
def test_rows_do_not_see_each_other_nor_their_padding(seed):
    """A public loop let one row's double fire take weight from other rows."""
    frames, alphas, mask, targets = random_case(seed, max_tokens=60)
    frames = frames.masked_fill(~mask[..., None], float("nan"))
    batch = continuous_integrate_and_fire(frames, alphas, mask, targets)
    for row in range(4):
        alone = continuous_integrate_and_fire(
            frames[row : row + 1, mask[row]], alphas[row : row + 1, mask[row]], None, targets[row : row + 1]
        )
        assert torch.equal(batch.speech_tokens[row, : targets[row]], alone.speech_tokens[0])
        assert torch.equal(batch.firing_places[row, : targets[row]], alone.firing_places[0])


@pytest.mark.parametrize("seed", range(3))
def test_weights_of_a_token_sum_to_one(seed):
    _, alphas, mask, targets = random_case(seed)
    ones = torch.ones(*alphas.shape, 1)
    tokens = continuous_integrate_and_fire(ones, alphas, mask, targets).speech_tokens[..., 0]
    is_token = torch.arange(tokens.shape[1]) < targets[:, None]
    torch.testing.assert_close(tokens, is_token.float(), rtol=0, atol=1e-5)


def test_predicted_count_is_the_rounded_sum_and_at_least_one():
    alphas = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.9, 0.8], [0.5, 0.5, 0.4]])
    output = continuous_integrate_and_fire(torch.randn(3, 3, 2), alphas)
    assert output.num_speech_tokens.tolist() == [1, 3, 1]
    torch.testing.assert_close(output.alpha_sum, torch.tensor([0.3, 2.6, 1.4]))


def test_alpha_sum_is_unscaled_even_with_target_lengths():
    alphas = torch.tensor([[0.5, 0.5, 0.5]])
    output = continuous_integrate_and_fire(torch.randn(1, 3, 2), alphas, target_lengths=torch.tensor([3]))
    torch.testing.assert_close(output.alpha_sum, torch.tensor([1.5]))


def test_firing_places_are_where_the_integral_crosses():
    alphas = torch.tensor([[0.5, 1.0, 0.5, 2.0]])
    output = continuous_integrate_and_fire(torch.randn(1, 4, 2), alphas)
    torch.testing.assert_close(output.firing_places, torch.tensor([[1.5, 3.0, 3.5, 4.0]]))


def test_bfloat16_frames_do_not_move_boundaries():
    """In bf16 an integral of 200 tokens loses whole frames."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 1500, 8, generator=generator).bfloat16()
    alphas = (torch.rand(1, 1500, generator=generator) * 0.3).bfloat16()
    low = continuous_integrate_and_fire(frames, alphas)
    full = continuous_integrate_and_fire(frames.float(), alphas.float())
    assert low.speech_tokens.dtype == torch.bfloat16
    assert torch.equal(low.firing_places, full.firing_places)
    assert torch.equal(low.speech_tokens, full.speech_tokens.bfloat16())


def test_all_zero_alphas_give_zero_tokens_and_finite_gradients():
    alphas = torch.zeros(2, 4, requires_grad=True)
    frames = torch.randn(2, 4, 3, requires_grad=True)
    output = continuous_integrate_and_fire(frames, alphas, target_lengths=torch.tensor([2, 1]))
    output.speech_tokens.sum().backward()
    assert (output.speech_tokens == 0).all()
    assert alphas.grad.isfinite().all() and frames.grad.isfinite().all()


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [3, 0, 17, 20], [39, 1]])
def test_streaming_equals_the_unscaled_loop_for_every_chunking(chunks):
    generator = torch.Generator().manual_seed(2)
    frames = torch.randn(40, 5, generator=generator)
    alphas = torch.rand(40, generator=generator) * 0.4
    alphas[11] = 3.7  # several fires in one frame
    state, tokens, places = None, [], []
    for start, size in zip(torch.tensor([0, *chunks]).cumsum(0).tolist(), chunks):
        piece = slice(start, start + size)
        fired, at, state = stream_integrate_and_fire(frames[piece], alphas[piece], state)
        tokens.append(fired)
        places.append(at)
    tokens, places = torch.cat(tokens), torch.cat(places)
    num_fired = int(alphas.double().sum())
    expected = literal_tokens(frames.double(), alphas.double(), num_fired)
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-6, atol=2e-6)
    ends = torch.cat([torch.zeros(1), alphas.cumsum(0)])
    torch.testing.assert_close(torch.from_numpy(_interpolate(ends, num_fired)), places.double(), rtol=0, atol=1e-4)


def _interpolate(ends, num_fired):
    return np.interp(np.arange(1, num_fired + 1), ends.double().numpy(), np.arange(len(ends)))


@pytest.mark.parametrize("residue, fires", [(0.49, 0), (0.5, 1), (0.9, 1)])
def test_a_stream_ends_with_one_more_token_when_half_is_left(residue, fires):
    frames = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    alphas = torch.tensor([1.0, residue / 2, residue / 2])
    tokens, _, state = stream_integrate_and_fire(frames, alphas)
    assert len(tokens) == 1
    last, places = flush_stream(state)
    assert len(last) == len(places) == fires
    if fires:
        torch.testing.assert_close(last[0], frames[1:].mean(0))
        assert places.tolist() == [3.0]


def test_bad_shapes_and_lengths_are_named():
    frames, alphas = torch.randn(2, 4, 3), torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"alphas of shape \(B, T\).*\(2, 3\)"):
        continuous_integrate_and_fire(frames, alphas[:, :3])
    with pytest.raises(ValueError, match="frame_mask of shape"):
        continuous_integrate_and_fire(frames, alphas, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="one target length per row"):
        continuous_integrate_and_fire(frames, alphas, target_lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="at least 1"):
        continuous_integrate_and_fire(frames, alphas, target_lengths=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"shape \(T, C\)"):
        stream_integrate_and_fire(frames, alphas)


# -- at any speed ------------------------------------------------------------------------------------------------------


def test_gradients_are_exact_in_float64():
    """Of frames and alphas, with padding, an alpha of zero, several fires per frame, and a frame of many tokens."""
    frames, alphas, mask, targets = random_case(8, num_frames=11, num_channels=3)
    alphas[0, 1], alphas[1, 2] = 0.0, 20.0
    frames, alphas = frames.double().requires_grad_(), alphas.double().requires_grad_()

    def tokens(frames, alphas):
        return continuous_integrate_and_fire(frames, alphas.abs(), mask, targets).speech_tokens

    alphas.data[0, 1] = 1e-3  # |alpha| has no derivative at 0, and alphas are not negative
    assert torch.autograd.gradcheck(tokens, (frames, alphas))


def test_a_frame_of_weight_zero_knows_what_more_weight_would_do():
    frames, alphas, mask, _ = random_case(4)
    mask, targets = torch.ones_like(mask), torch.full((4,), 6)
    alphas[:, 7] = 0.0
    direction = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)).double()

    def total(alphas):
        return (continuous_integrate_and_fire(frames.double(), alphas, mask, targets).speech_tokens * direction).sum()

    alphas = alphas.double().requires_grad_()
    (gradient,) = torch.autograd.grad(total(alphas), alphas)
    nudge = torch.zeros_like(alphas)
    nudge[2, 7] = 1e-7
    numeric = (total(alphas.detach() + nudge) - total(alphas.detach())) / 1e-7
    torch.testing.assert_close(gradient[2, 7], numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [20, 100, 2000])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_error_stays_below_a_millionth(mean, num_tokens):
    """Tokens and gradients. Running sums over frames lose digits where a channel has a large mean, and so do products
    with frames in the alphas' gradient, in which the mean cancels out; 2000 tokens fire several per frame."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(2, 1500, 8, generator=generator) + mean * torch.rand(8, generator=generator)
    alphas = torch.rand(2, 1500, generator=generator)
    mask = torch.arange(1500) < torch.tensor([[1500], [1300]])
    targets = torch.tensor([num_tokens, num_tokens // 2])
    direction = torch.randn(2, num_tokens, 8, generator=generator)
    frames.requires_grad_(), alphas.requires_grad_()
    tokens = continuous_integrate_and_fire(frames, alphas, mask, targets).speech_tokens
    gradients = torch.autograd.grad(tokens, (frames, alphas), direction)
    exact = frames.detach().double().requires_grad_(), alphas.detach().double().requires_grad_()
    expected = literal_cif(*exact, mask, targets)
    total = sum((row * along[: len(row)]).sum() for row, along in zip(expected, direction.double()))
    results = [(row[: len(right)], right) for row, right in zip(tokens, expected)]
    for gradient, right in zip(gradients, torch.autograd.grad(total, exact)):
        results += zip(gradient, right)
    for result, right in results:
        assert (result.double() - right).abs().max() <= 1e-6 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 11])
def test_half_precision_is_summed_in_float32(dtype, batch_size):
    generator = torch.Generator().manual_seed(0)
    # Rows of 64 bytes in float32: some kernels sum by the address of a row, which is another one in a copy.
    frames = torch.randn(batch_size, 300, 16, generator=generator).to(dtype)
    alphas = torch.rand(batch_size, 300, generator=generator)
    targets = torch.arange(7, 7 + batch_size)
    direction = torch.randn(batch_size, int(targets.max()), 16, generator=generator).to(dtype)
    results = []
    for case in (frames, frames.float()):
        leaves = case.clone().requires_grad_(), alphas.clone().requires_grad_()
        tokens = continuous_integrate_and_fire(*leaves, None, targets).speech_tokens
        gradients = torch.autograd.grad(tokens, leaves, direction.to(tokens.dtype))
        results.append([tokens.to(dtype), gradients[0].to(dtype), gradients[1]])
    for low, full in zip(*results):
        assert torch.equal(low, full)


@pytest.mark.parametrize("padding", [float("nan"), float("inf")])
def test_no_padding_can_poison_a_row(padding):
    """At the end, at the start, in between, and rows of nothing else."""
    frames, alphas, _, targets = random_case(6)
    mask = torch.ones(4, 23, dtype=torch.bool)
    mask[0, 15:], mask[1, :6], mask[2, 4:9], mask[3] = False, False, False, False
    frames, alphas = (tensor.clone().masked_fill_(~extra, padding) for tensor, extra in
                      ((frames, mask[..., None]), (alphas, mask)))  # fmt: skip
    frames, alphas = frames.requires_grad_(), alphas.requires_grad_()
    tokens = continuous_integrate_and_fire(frames, alphas, mask, targets).speech_tokens
    tokens.square().sum().backward()
    assert tokens[:3].isfinite().all() and (tokens[3] == 0).all()
    for gradient in (frames.grad, alphas.grad):
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all() and (gradient[:3][mask[:3]] != 0).any()


def test_alphas_that_predict_no_count_are_named():
    alphas = torch.tensor([[0.5, float("nan")]])
    with pytest.raises(ValueError, match=r"finite alphas, but their sums are \[nan\]"):
        continuous_integrate_and_fire(torch.randn(1, 2, 3), alphas)


def test_broken_alphas_reach_no_memory_outside():
    """Negative and NaN alphas are wrong, and their tokens too; but indices made from them must not be."""
    frames, alphas, mask, targets = random_case(9)
    alphas[0] -= 0.5
    alphas[1, 3], alphas[2, 4], alphas[3, 0] = float("nan"), float("inf"), -1e30
    alphas.requires_grad_(), frames.requires_grad_()
    tokens = continuous_integrate_and_fire(frames, alphas, None, targets).speech_tokens
    tokens.sum().backward()
    assert tokens[1].isnan().any() and frames.grad.shape == frames.shape


def test_second_derivatives_are_refused():
    frames, alphas, _, targets = random_case(0)
    tokens = continuous_integrate_and_fire(frames, alphas.requires_grad_(), None, targets).speech_tokens
    (gradient,) = torch.autograd.grad(tokens.square().sum(), alphas, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


class Operations(TorchDispatchMode):
    """Counts operations, and the bytes of the largest tensor that they make."""

    def __init__(self, given):
        super().__init__()
        self.given, self.count, self.largest = given.untyped_storage().data_ptr(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        for made in result if isinstance(result, tuple) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.given:
                self.largest = max(self.largest, made.untyped_storage().nbytes())
        return result


def test_no_loop_over_rows_frames_or_tokens_and_no_copy_of_the_frames():
    counts = []
    for size in ({"batch_size": 2, "num_frames": 7}, {"batch_size": 9, "num_frames": 80}):
        frames, alphas, mask, targets = random_case(0, num_channels=64, **size)
        alphas.requires_grad_()
        with Operations(frames) as operations:
            tokens = continuous_integrate_and_fire(frames, alphas, mask, targets).speech_tokens
            tokens.sum().backward()
        counts.append(operations.count)
    assert counts[0] == counts[1]
    assert operations.largest < 4 * frames.numel() / 3


@pytest.mark.parametrize("seed", range(3))
def test_a_long_stream_is_the_same_however_it_is_cut(seed):
    generator = torch.Generator().manual_seed(seed)
    frames, alphas = torch.randn(3000, 4, generator=generator), torch.rand(3000, generator=generator) ** 4
    whole, places, _ = stream_integrate_and_fire(frames, alphas)
    state, tokens, places_in_pieces = None, [], []
    cuts = torch.randint(0, 3000, (300,), generator=generator).sort().values.tolist()
    for start, stop in zip([0, *cuts], [*cuts, 3000]):
        fired, at, state = stream_integrate_and_fire(frames[start:stop], alphas[start:stop], state)
        tokens.append(fired)
        places_in_pieces.append(at)
        # What is carried does not grow.
        assert state.partial_token.shape == (4,) and 0 <= state.partial_weight < 1 and state.num_frames == stop
    assert torch.equal(torch.cat(places_in_pieces), places)
    torch.testing.assert_close(torch.cat(tokens), whole, rtol=1e-6, atol=2e-6)
