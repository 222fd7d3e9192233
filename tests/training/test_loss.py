# SPDX-License-Identifier: Apache-2.0
"""The chunked losses equal their definitions, gradients included."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_dms.modeling.divergence import kl_divergence
from modelopt_dms.training.loss import mean_decision, rate_loss

DIRECTIONS = ("forward", "reverse")


def make_problem(seed, B=2, T=7, C=5, V=11):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, B, T, C, generator=generator)
    weight = torch.randn(V, C, generator=generator)
    valid = torch.rand(B, T, generator=generator) < 0.7
    valid[0, 0] = True
    return student, teacher, weight, valid


def dense_kl(student, teacher, weight, valid, direction):
    """The definition, in float64: sum over the vocabulary of p log(p / q), mean over valid tokens."""
    p, q = (torch.softmax(x.double() @ weight.double().T, -1) for x in (teacher, student))
    if direction == "reverse":
        p, q = q, p
    return (p * (p / q).log()).sum(-1)[valid].mean()


def chunked_kl(student, teacher, weight, valid, direction, chunk_tokens, head=None):
    head = head or (lambda hidden: hidden @ weight.T)
    return kl_divergence(
        student, teacher, valid, head, head, direction=direction, chunk_tokens=chunk_tokens
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(DIRECTIONS), st.integers(1, 20))
def test_chunked_kl_and_its_gradients_equal_the_dense_definition(seed, direction, chunk_tokens):
    student, teacher, weight, valid = make_problem(seed)
    found, expected = (
        (student.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())
        for dtype in (torch.float32, torch.float64)
    )
    value = chunked_kl(found[0], teacher, found[1], valid, direction, chunk_tokens)
    value.backward()
    dense = dense_kl(expected[0], teacher, expected[1], valid, direction)
    # The head of the teacher has no gradient, in ours; nor may it have in the definition.
    (student_grad,) = torch.autograd.grad(dense, expected[0])
    torch.testing.assert_close(value.double(), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0].grad.double(), student_grad, rtol=1e-4, atol=1e-6)
    assert not found[0].grad[~valid].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(DIRECTIONS), st.integers(1, 20))
def test_kl_does_not_depend_on_the_chunk_size(seed, direction, chunk_tokens):
    student, teacher, weight, valid = make_problem(seed)
    weight.requires_grad_()
    values, gradients = [], []
    for size in (chunk_tokens, 1000):
        value = chunked_kl(student, teacher, weight, valid, direction, size)
        values.append(value)
        gradients.append(torch.autograd.grad(value, weight)[0])
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_forward_is_teacher_to_student():
    """A teacher that is sure of one of two tokens, and a student that is not: KL(p || q) = log 2."""
    teacher, student = torch.tensor([[[20.0, -20.0]]]), torch.zeros(1, 1, 2)
    valid = torch.ones(1, 1, dtype=torch.bool)
    forward = chunked_kl(student, teacher, torch.eye(2), valid, "forward", 4)
    reverse = chunked_kl(student, teacher, torch.eye(2), valid, "reverse", 4)
    assert forward.item() == pytest.approx(0.693147, abs=1e-5)
    assert reverse.item() == pytest.approx(20 - 0.693147, abs=1e-4)


def test_kl_of_equal_distributions_is_zero_and_of_others_positive():
    student, teacher, weight, valid = make_problem(0)
    for direction in DIRECTIONS:
        assert chunked_kl(student, student, weight, valid, direction, 3).abs() < 1e-6
        assert chunked_kl(student, teacher, weight, valid, direction, 3) > 0.1


def test_logits_exist_for_one_chunk_at_a_time_also_in_the_backward_pass():
    student, teacher, weight, valid = make_problem(0, B=4, T=64)
    made, live_rows = [], []

    def head(hidden):
        logits = hidden @ weight.T
        made.append(weakref.ref(logits))
        live_rows.append(sum(len(x()) for x in made if x() is not None))
        return logits

    chunked_kl(student.requires_grad_(), teacher, weight, valid, "forward", 16, head).backward()
    assert len(made) == 4 * -(-int(valid.sum()) // 16)  # twice for both: once forward, once again
    assert max(live_rows) <= 2 * 16  # the student's and the teacher's


def test_teacher_head_gets_no_gradient():
    student, teacher, weight, valid = make_problem(1)
    teacher_weight = weight.clone().requires_grad_()
    value = kl_divergence(
        student.requires_grad_(),
        teacher,
        valid,
        lambda hidden: hidden @ weight.T,
        lambda hidden: hidden @ teacher_weight.T,
        direction="reverse",
        chunk_tokens=4,
    )
    value.backward()
    assert teacher_weight.grad is None
    assert student.grad.abs().sum() > 0


def test_mean_decision_is_the_mean_over_layers_heads_and_counted_tokens():
    torch.manual_seed(0)
    decisions = {0: torch.rand(2, 3, 5), 4: torch.rand(2, 1, 5)}
    counted = torch.rand(2, 5) < 0.5
    every = torch.cat([x.transpose(1, 2)[counted].flatten() for x in decisions.values()])
    torch.testing.assert_close(mean_decision(decisions, counted), every.mean())
    hard = {0: decisions[0] > 0.5}
    torch.testing.assert_close(
        mean_decision(hard, counted), hard[0].transpose(1, 2)[counted].float().mean()
    )
    assert mean_decision(decisions, torch.zeros_like(counted)) == 0


@given(st.floats(0, 1), st.floats(0, 1))
def test_rate_loss_is_one_sided(fraction, target):
    evicted = torch.tensor(fraction, dtype=torch.float64, requires_grad=True)
    loss = rate_loss(evicted, target)
    assert loss.item() == pytest.approx(max(0.0, target - fraction))
    loss.backward()
    assert evicted.grad.item() == (-1.0 if fraction <= target else 0.0)
