"""Losses: against literal formulas, their laws, and the logits of every LLM's own forward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_blsp_kd import distillation
from modeling_blsp_kd.distillation import (
    linear_cross_entropy,
    linear_kl,
    linear_kl_of_rows,
    postprocess_logits,
    predicts_next,
    quantity_loss,
    same_likeliest_token,
)
from modeling_blsp_kd.distillation_step import OutputHead
from modeling_blsp_kd.kept_teacher import KeptTeacher
from modeling_blsp_kd.training.output_head import check_output_head
from modeling_blsp_kd.training.step_cost import FAKE, FakeNumbers, LiveBytes
from tests.helpers.literal_losses import DIVERGENCES, literal_divergence, states
from tests.helpers.models import FAMILIES, make_model

pytestmark = pytest.mark.numerical


def literal_kl(student, teacher, weight, temperature, bias=None, scale=1.0, softcap=None, **divergence):
    """Sum over rows and vocabulary of p_teacher * log(p_teacher / p_student), entry by entry in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for student_row, teacher_row in zip(student.double(), teacher.double()):
        rows = []
        for row in (student_row, teacher_row):
            logits = weight.double() @ row + (0 if bias is None else bias.double())
            logits = logits * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            rows.append(logits)
        total = total + literal_divergence(*rows, temperature, **divergence)
    return total


@pytest.mark.parametrize("chunk_rows", [1, 3, 128, None])
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5, "bias": True}]
)
def test_linear_kl_equals_the_formula_in_value_and_gradient(options, chunk_rows):
    student, teacher, weight = states()
    options = dict(options)
    bias = torch.linspace(-1, 1, 11) if options.pop("bias", False) else None
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss = linear_kl(student, teacher, weight, 1.7, lm_head_bias=bias, chunk_rows=chunk_rows, **options)
    expected = literal_kl(exact, teacher, weight, 1.7, bias, **options) / 7
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"scale": 3.0, "softcap": 1.5, "bias": True}])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_other_divergences_equal_their_formulas_in_value_and_gradient(divergence, options):
    student, teacher, weight = states()
    options = {**options, **divergence}
    bias = torch.linspace(-1, 1, 11) if options.pop("bias", False) else None
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss = linear_kl(student, teacher, weight, 1.7, lm_head_bias=bias, chunk_rows=3, **options)
    expected = literal_kl(exact, teacher, weight, 1.7, bias, **options) / 7
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_jensen_shannon_lies_between_its_limits():
    """Its slope at beta = 0 is the forward KL, at beta = 1 the reverse one; beta = 1/2 is symmetric."""
    student, teacher, weight = states()

    def jsd(beta, one=student, other=teacher):
        return linear_kl(one, other, weight, divergence="jsd", jsd_beta=beta)

    torch.testing.assert_close(jsd(1e-3) / 1e-3, linear_kl(student, teacher, weight), rtol=0.02, atol=0)
    reverse = linear_kl(student, teacher, weight, divergence="reverse")
    torch.testing.assert_close(jsd(0.999) / 0.001, reverse, rtol=0.02, atol=0)
    torch.testing.assert_close(reverse, linear_kl(teacher, student, weight))
    torch.testing.assert_close(jsd(0.3), jsd(0.7, teacher, student))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jensen_shannon_of_what_has_nothing_in_common_is_the_entropy_of_beta(beta):
    """Probabilities of float32 underflow there, whose logarithm is infinite, and 0 times infinity is NaN."""
    student = torch.tensor([[200.0, 0.0]], requires_grad=True)
    teacher, weight = torch.tensor([[0.0, 200.0]]), torch.eye(4, 2)
    loss = linear_kl(student, teacher, weight, 1.0, divergence="jsd", jsd_beta=beta)
    torch.testing.assert_close(loss, -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log()))
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("tile_size", [1, 25])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tiles_of_a_chunk_do_not_change_it(tile_size, softcap, monkeypatch):
    results = []
    for size in (distillation.TILE_SIZE, tile_size):
        monkeypatch.setattr(distillation, "TILE_SIZE", size)
        student, teacher, weight = states()
        loss = linear_kl(student.requires_grad_(), teacher, weight, softcap=softcap, chunk_rows=5)
        results.append([loss, torch.autograd.grad(loss, student)[0]])
    torch.testing.assert_close(*results)


def test_two_losses_of_one_pass_are_those_of_two():
    """Response and input KL go through the vocabulary together, and weigh differently."""
    student, teacher, weight = states()
    student.requires_grad_()
    rows = linear_kl_of_rows(student, teacher, weight, chunk_rows=4)
    together = [rows[:3].sum(), rows[3:].sum()]
    apart = [linear_kl(student[part], teacher[part], weight, reduction="sum") for part in (slice(3), slice(3, None))]
    torch.testing.assert_close(together, apart)
    gradients = [torch.autograd.grad(2 * one + 0.3 * other, student)[0] for one, other in (together, apart)]
    torch.testing.assert_close(*gradients)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made while this is on, other than views of what was there."""

    def __init__(self, given):
        super().__init__()
        self.given, self.numel = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.given:
            self.numel = max(self.numel, made.untyped_storage().nbytes() // made.element_size())
        return made


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_one_chunk_are_all_that_is_made(dtype, divergence):
    """And no copy of the head, or of its transpose, though they are larger."""
    student, teacher, weight = states(num_rows=64, width=40, vocabulary=1000, dtype=dtype)
    with LargestTensor(weight) as largest:
        linear_kl(student.requires_grad_(), teacher, weight, chunk_rows=8, divergence=divergence).backward()
    assert largest.numel == 2 * 8 * 1000


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "kept"])
def test_memory_is_a_quarter_of_one_logits_tensor(divergence, monkeypatch):
    """All that is alive at one time, at 2,048 tokens; full logits of both sides and their gradient take seven."""
    num_rows, width, vocab_size = 2048, 32, 2**16
    monkeypatch.setattr(distillation, "TILE_SIZE", 2**19)  # few tiles, as operations without contents take time, too
    with FAKE:
        student = torch.empty(num_rows, width, requires_grad=True)
        teacher, weight = torch.empty(num_rows, width), torch.empty(vocab_size, width)
        kept = KeptTeacher(torch.zeros(num_rows, 8, dtype=torch.long), torch.empty(num_rows, 9))
    with FakeNumbers(), LiveBytes(on_gpu=False) as live:
        if divergence == "kept":
            linear_kl_of_rows(student, kept, weight).sum().backward()
        else:
            linear_kl(student, teacher, weight, divergence=divergence).backward()
    assert live.peak <= 0.25 * 4 * num_rows * vocab_size


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_it_is_the_same(bias):
    student, teacher, weight = states()
    bias = torch.linspace(-1, 1, 11) if bias else None
    student.requires_grad_()

    def loss(student, teacher):
        return linear_kl(student, teacher, weight, lm_head_bias=bias, chunk_rows=3)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(compiled, loss(student, teacher))
    gradients = [torch.autograd.grad(value, student)[0] for value in (compiled, loss(student, teacher))]
    torch.testing.assert_close(*gradients)


def test_under_autocast_products_are_in_its_precision():
    student, teacher, weight = states()
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kl(student, teacher, weight)
    expected = linear_kl(student.bfloat16(), teacher.bfloat16(), weight.bfloat16())
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_states_give_zero_and_direction_matters(dtype):
    """Some CPUs sum rows by their address: the same state gave two logits, and a KL of 4e-9 in float32."""
    student, teacher, weight = states(dtype=dtype)
    # A logit's error is at most its width times the rounding of its terms, and that of a KL a mean of such errors.
    terms = (student.abs() @ weight.abs().T).max()
    assert linear_kl(student, student, weight).abs() <= student.shape[1] * torch.finfo(dtype).eps * terms
    for divergence in DIVERGENCES:  # float32 inside, whatever the dtype
        zero = linear_kl(student, student, weight, **divergence)
        assert zero.abs() <= student.shape[1] * torch.finfo(torch.float32).eps * terms
    assert linear_kl(student, teacher, weight) > 0
    assert (linear_kl(student, teacher, weight) - linear_kl(teacher, student, weight)).abs() > 1e-3


@pytest.mark.parametrize("chunk_rows", [1, 3, 192])
def test_the_likeliest_tokens_are_compared_row_by_row(chunk_rows):
    student, teacher, weight = states()
    bias = torch.linspace(-1, 1, 11)
    teacher[:3] = student[:3] + 0.01
    likeliest = [
        [max(range(11), key=lambda token: float(row @ weight[token] + bias[token])) for row in rows]
        for rows in (student, teacher)
    ]
    same = same_likeliest_token(student, teacher, weight, lm_head_bias=bias, chunk_rows=chunk_rows)
    assert same.tolist() == [ours == theirs for ours, theirs in zip(*likeliest)]
    assert same.any() and not same.all()
    assert same_likeliest_token(student[:0], teacher[:0], weight).shape == (0,)


def test_temperature_divides_the_logits_and_nothing_multiplies_the_loss():
    student, teacher, weight = states()
    torch.testing.assert_close(
        linear_kl(student, teacher, weight, temperature=2.0), linear_kl(student, teacher, weight / 2, temperature=1.0)
    )


def test_sum_is_mean_times_rows():
    student, teacher, weight = states()
    torch.testing.assert_close(
        linear_kl(student, teacher, weight, reduction="sum"), 7 * linear_kl(student, teacher, weight)
    )


def test_no_rows_give_a_zero_with_a_graph():
    """A batch without response tokens returned a loss that could not be differentiated."""
    student, teacher, weight = states(num_rows=0)
    student.requires_grad_()
    for loss in (
        linear_kl(student, teacher, weight),
        linear_cross_entropy(student, torch.zeros(0, dtype=torch.long), weight),
    ):
        assert loss.item() == 0
        loss.backward()
    assert student.grad.shape == (0, 6)


def test_bfloat16_states_are_compared_in_float32():
    student, teacher, weight = states(dtype=torch.bfloat16)
    student.requires_grad_()
    loss = linear_kl(student, teacher, weight)
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, linear_kl(*states()), rtol=0.05, atol=0.02)


def test_second_derivatives_are_refused():
    student, teacher, weight = states()
    student.requires_grad_()
    loss = linear_kl(student, teacher, weight).square()
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_wrong_arguments_are_named():
    student, teacher, weight = states()
    with pytest.raises(ValueError, match=r"one shape \(N, D\).*\(6, 6\)"):
        linear_kl(student, teacher[:6], weight)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        linear_kl(student, teacher, weight, temperature=0)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
        linear_kl(student, teacher, weight, reduction="none")
    with pytest.raises(ValueError, match=r"divergence must be one of \('forward', 'reverse', 'jsd'\), got 'js'"):
        linear_kl(student, teacher, weight, divergence="js")
    with pytest.raises(ValueError, match="jsd_beta must lie between 0 and 1, got 1"):
        linear_kl(student, teacher, weight, divergence="jsd", jsd_beta=1)
    with pytest.raises(ValueError, match="freeze it"):
        linear_kl(student, teacher, weight.requires_grad_())


@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 2.0}])
def test_cross_entropy_equals_the_formula(options):
    student, _, weight = states()
    targets = torch.tensor([0, 3, 10, 2, 2, 7, 1])
    logits = postprocess_logits(student @ weight.T, **options).double()
    expected = -sum(torch.log(torch.exp(row) / torch.exp(row).sum())[target] for row, target in zip(logits, targets))
    actual = linear_cross_entropy(student, targets, weight, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_quantity_loss_is_the_relative_miss():
    loss = quantity_loss(torch.tensor([3.0, 9.0, 4.0]), torch.tensor([4, 6, 4]))
    torch.testing.assert_close(loss, torch.tensor(0.25 + 0.5))


def test_predictors_stand_one_step_before_their_tokens():
    """Public code selected logits at the labels themselves, so the first response token was never distilled."""
    is_response = torch.tensor([[False, False, True, True], [True, False, False, True]])
    assert predicts_next(is_response).tolist() == [[False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite"])
def test_losses_see_the_logits_of_the_llms_own_forward(family):
    """Soft-capped and scaled logits were distilled raw."""
    overrides = {"cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 4.0}}.get(family, {})
    model = make_model(family, text=overrides)
    check_output_head(model.language_model)
    input_ids = torch.arange(1, 13)[None]
    own = model.language_model(input_ids=input_ids).logits[0].float()
    head = OutputHead.of(model.language_model)
    hidden = model.language_model.base_model(input_ids=input_ids).last_hidden_state[0]
    targets = torch.arange(12)
    actual = linear_cross_entropy(hidden, targets, head.weight, **head.options)
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(own, targets, reduction="sum"))


def test_an_llm_with_unknown_logits_is_refused(monkeypatch):
    language_model = make_model("gemma2").language_model
    forward = language_model.forward

    def with_other_logits(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    monkeypatch.setattr(language_model, "forward", with_other_logits)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM treats its logits"):
        check_output_head(language_model)
