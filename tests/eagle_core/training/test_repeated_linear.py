"""One weight used several times: the gradients of plain products, rounded once."""

import torch

from eagle_core.training.repeated_linear import RepeatedLinear

_ROWS = (3, 0, 40, 17)


def _gradients(
    linear_of: type[RepeatedLinear] | None, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return gradients of a weight and of its inputs, in plain products where there is no class."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64).bfloat16().double()
    inputs = [
        torch.randn(rows, 5, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
        for rows in _ROWS
    ]
    for tensor in (weight, *inputs):
        tensor.requires_grad_()
    linear = linear_of(weight, dtype) if linear_of else lambda states: states @ weight.T
    outputs = [linear(states) for states in inputs]
    slopes = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
        for output in outputs
    ]
    torch.autograd.backward(outputs, slopes)
    assert weight.grad is not None
    return weight.grad, [states.grad for states in inputs if states.grad is not None]


def test_gradients_are_those_of_plain_products() -> None:
    expected, expected_of_inputs = _gradients(None, torch.float64)
    found, found_of_inputs = _gradients(RepeatedLinear, torch.float64)
    torch.testing.assert_close(found, expected)
    assert len(found_of_inputs) == len(_ROWS)
    for one, other in zip(found_of_inputs, expected_of_inputs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_weight_gradient_is_rounded_once() -> None:
    expected, _ = _gradients(None, torch.float64)
    found, _ = _gradients(RepeatedLinear, torch.bfloat16)
    assert found.dtype == torch.float64  # the weight's
    assert ((found - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()


def test_the_gradient_of_a_bias_is_the_sum_over_all_uses() -> None:
    weight, bias = torch.ones(2, 3), torch.tensor([0.5, -1.0], requires_grad=True)
    linear = RepeatedLinear(weight, torch.bfloat16, bias)
    outputs = [linear(torch.ones(rows, 3, dtype=torch.bfloat16)) for rows in _ROWS]
    assert outputs[0].tolist() == [[3.5, 2.0]] * 3
    torch.cat(outputs).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [sum(_ROWS)] * 2


def test_a_weight_that_is_not_trained_gets_no_gradient() -> None:
    weight, states = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    RepeatedLinear(weight, torch.float32)(states).sum().backward()
    assert weight.grad is None
    assert states.grad is not None
    assert (states.grad == 2).all()
