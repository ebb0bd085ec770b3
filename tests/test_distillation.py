"""Losses: against literal formulas, their laws, and the logits of every LLM's own forward."""

import pytest
import torch
from conftest import FAMILIES, make_model, text_config

from modeling_blsp_kd.distillation import (
    linear_cross_entropy,
    linear_kl,
    postprocess_logits,
    predicts_next,
    quantity_loss,
)


def states(num_rows=7, width=6, vocabulary=11, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(num_rows, width, generator=generator).to(dtype) for _ in range(2))
    return student, teacher, torch.randn(vocabulary, width, generator=generator).to(dtype)


def literal_kl(student, teacher, weight, temperature, bias=None, scale=1.0, softcap=None):
    """Sum over rows and vocabulary of p_teacher * log(p_teacher / p_student), entry by entry in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for student_row, teacher_row in zip(student.double(), teacher.double()):
        rows = []
        for row in (student_row, teacher_row):
            logits = weight.double() @ row + (0 if bias is None else bias.double())
            logits = logits * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            exponentials = torch.exp(logits / temperature)
            rows.append(exponentials / exponentials.sum())
        for p_student, p_teacher in zip(*rows):
            total = total + p_teacher * torch.log(p_teacher / p_student)
    return total


@pytest.mark.parametrize("chunk_rows", [1, 3, 128])
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


def test_identical_states_give_zero_and_direction_matters():
    student, teacher, weight = states()
    assert linear_kl(student, student, weight).item() == 0
    assert linear_kl(student, teacher, weight) > 0
    assert (linear_kl(student, teacher, weight) - linear_kl(teacher, student, weight)).abs() > 1e-3


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
    model.check_output_head()
    input_ids = torch.arange(1, 13)[None]
    own = model.language_model(input_ids=input_ids).logits[0].float()
    weight, options = model._output_head()
    hidden = model.language_model.base_model(input_ids=input_ids).last_hidden_state[0]
    targets = torch.arange(12)
    actual = linear_cross_entropy(hidden, targets, weight, **options)
    torch.testing.assert_close(actual, torch.nn.functional.cross_entropy(own, targets, reduction="sum"))


def test_an_llm_with_unknown_logits_is_refused():
    model = make_model("gemma2")
    model.config.text_config = text_config("gemma2", final_logit_softcapping=None)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM treats its logits"):
        model.check_output_head()
