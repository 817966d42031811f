"""Idioms of number formats and of chance: complex, half, double, integers, autocast, random numbers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .case import EITHER
from .idioms import WIDTH, idiom, weighted_square, whole


@idiom("sequences")
def spectrum_filtered(h: torch.Tensor) -> torch.Tensor:
    spectrum = torch.fft.rfft(h, dim=2)
    return torch.fft.irfft(spectrum * spectrum.abs(), n=WIDTH, dim=2)


@idiom("sequences")
def spectrum_over_time(h: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real


@idiom()
class ComplexParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        z = h.to(torch.complex64) @ self.weight
        return z * z.conj().exp()


@idiom()
def complex_from_polar(h: torch.Tensor) -> torch.Tensor:
    z = torch.polar(h.abs(), h)
    return torch.view_as_real(z * z).flatten(1)


@idiom("sequences")
def rotary_by_complex_numbers(h: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(h.shape[1])[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(2)


@idiom()
def real_and_imaginary_parts_apart(h: torch.Tensor) -> torch.Tensor:
    z = torch.complex(h, h.sin())
    w = z / (1 + z.abs())
    return w.real - 2 * w.imag


@idiom(dtype=torch.float64)
class DoublePrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h).softmax(-1)


@idiom(dtype=torch.bfloat16)
class Bfloat16Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(h))


@idiom(dtype=torch.float16)
class Float16Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h).float().softmax(-1).half()


@idiom()
class MixedPrecisionByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        self.fine = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.fine(self.coarse(h.bfloat16()).double()).float()


@idiom()
class AutocastOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.second(torch.tanh(self.layer(h)))
        return h.float()


@idiom()
class AutocastSwitchedOffInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.layer(h)
            with torch.autocast("cpu", enabled=False):
                h = self.second(h.float())
            return (h @ h.t() @ h).float()


@idiom()
class AutocastAsADecorator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    @torch.autocast("cpu", dtype=torch.float16)
    def cast(self, h: torch.Tensor) -> torch.Tensor:
        return self.layer(h)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.cast(h).float() + h


@idiom()
class AutocastWithConvolutionAndNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.norm(self.layer(h)).float()


@idiom(expected=EITHER)
def float8_between_two_operators(h: torch.Tensor) -> torch.Tensor:
    rounded = h.to(torch.float8_e4m3fn)
    return h * rounded.to(torch.float32).sigmoid()


@idiom()
def integers_and_booleans_cross(h: torch.Tensor) -> torch.Tensor:
    order, positive = h.argsort(1), h > 0
    return h.gather(1, order) * positive + order.float() * 0.1


@whole(
    loss=lambda: weighted_square,
    batch=lambda rows: (torch.randint(0, 255, (rows, WIDTH)).to(torch.uint8), torch.randn(rows)),
)
class BytesAsInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.float() / 255 - 0.5)


@idiom()
class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(self.dropout(h)))


@idiom()
def alpha_dropout(h: torch.Tensor) -> torch.Tensor:
    return functional.alpha_dropout(h, 0.3, training=True) * h


@idiom("images")
def feature_dropout(h: torch.Tensor) -> torch.Tensor:
    return functional.dropout2d(h, 0.3, training=True) * h


@idiom("sequences")
def feature_alpha_dropout(h: torch.Tensor) -> torch.Tensor:
    return functional.feature_alpha_dropout(h, 0.3, training=True) + h


@idiom()
def dropout_in_place(h: torch.Tensor) -> torch.Tensor:
    return functional.dropout(h * 2, 0.3, training=True, inplace=True) + 1


@idiom()
def noise_added(h: torch.Tensor) -> torch.Tensor:
    return h + 0.1 * torch.randn_like(h) + torch.rand(h.shape[0], 1)


@idiom()
def noise_in_place(h: torch.Tensor) -> torch.Tensor:
    noise = torch.empty_like(h).uniform_(-1, 1)
    return h * torch.empty_like(h).bernoulli_(0.8) + noise.normal_(0, 0.1)


@idiom()
def reparametrised_normal(h: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(h, h.exp(), validate_args=False).rsample()


@idiom()
def gumbel_softmax(h: torch.Tensor) -> torch.Tensor:
    return functional.gumbel_softmax(h, tau=0.7, hard=True)


@idiom()
def random_permutation_of_rows(h: torch.Tensor) -> torch.Tensor:
    return h + h[torch.randperm(h.shape[0])] * 0.5


@idiom()
def random_integers_choose(h: torch.Tensor) -> torch.Tensor:
    return h.gather(1, torch.randint(0, WIDTH, (h.shape[0], 3)))


@idiom()
def multinomial_choice(h: torch.Tensor) -> torch.Tensor:
    return h.gather(1, torch.multinomial(h.softmax(1), 3))


@idiom()
def stochastic_depth(h: torch.Tensor) -> torch.Tensor:
    keep = h.new_empty(h.shape[0], 1).bernoulli_(0.7).div_(0.7)
    return h + h.square() * keep


@idiom()
def randomised_leaky_relu(h: torch.Tensor) -> torch.Tensor:
    return functional.rrelu(h, training=True)


@idiom(expected=EITHER)
def generator_of_its_own(h: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    return h * noise


@idiom(expected=EITHER)
def seeds_torch_by_itself(h: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return h * torch.randn(WIDTH)
