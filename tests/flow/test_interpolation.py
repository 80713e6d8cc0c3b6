"""The path from data to noise and its velocity."""

import torch

from cosmos3_train.flow.interpolation import interpolate, velocity


def test_ends_middle_and_back():
    x0, noise = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    assert torch.equal(interpolate(x0, noise, 0.0), x0)
    assert torch.equal(interpolate(x0, noise, 1.0), noise)
    assert interpolate(x0, noise, 0.25).tolist() == [1.5, -0.5]
    assert velocity(x0, noise).tolist() == [2.0, 6.0]
    assert torch.equal(interpolate(x0, noise, 0.25) - 0.25 * velocity(x0, noise), x0)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda s: interpolate(x0, noise, s), sigma)
    torch.testing.assert_close(slope, velocity(x0, noise))
