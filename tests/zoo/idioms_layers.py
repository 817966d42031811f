"""torch's own layers where they are less plain than they look."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .case import EITHER
from .idioms import TOKENS, WIDTH, idiom, weighted_square, whole


def _module(name: str, make: object, kind: str = "vectors", expected: str | None = None) -> None:
    """Register a layer as an idiom."""

    def build(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer = make()  # type: ignore[operator]

    def forward(self: nn.Module, h: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(h)
        return found

    body = type(name, (nn.Module,), {"__init__": build, "forward": forward, "__module__": __name__})
    globals()[name] = body  # deepcopy and pickle look a class up by its name
    idiom(kind, *([expected] if expected else []))(body)


for _name, _make, _kind in (
    ("BatchNorm", lambda: nn.BatchNorm1d(WIDTH), "vectors"),
    ("BatchNormOfImages", lambda: nn.BatchNorm2d(WIDTH), "images"),
    (
        "BatchNormWithoutStatistics",
        lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
        "vectors",
    ),
    ("BatchNormInEvaluation", lambda: nn.BatchNorm1d(WIDTH).eval(), "vectors"),
    ("GroupNorm", lambda: nn.GroupNorm(2, WIDTH), "images"),
    ("InstanceNorm", lambda: nn.InstanceNorm2d(WIDTH, affine=True), "images"),
    (
        "InstanceNormWithStatistics",
        lambda: nn.InstanceNorm2d(WIDTH, track_running_stats=True),
        "images",
    ),
    ("RmsNorm", lambda: nn.RMSNorm(WIDTH), "sequences"),
    ("LocalResponseNorm", lambda: nn.LocalResponseNorm(3), "images"),
    (
        "TransposedConvolution",
        lambda: nn.ConvTranspose2d(WIDTH, 4, 3, stride=2, output_padding=1),
        "images",
    ),
    (
        "DepthwiseConvolution",
        lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, padding="same"),
        "images",
    ),
    ("DilatedConvolution", lambda: nn.Conv2d(WIDTH, 4, 3, dilation=2, padding=2), "images"),
    (
        "ConvolutionPaddedInCircles",
        lambda: nn.Conv2d(WIDTH, 4, 3, padding=1, padding_mode="circular"),
        "images",
    ),
    (
        "ConvolutionPaddedByReflection",
        lambda: nn.Conv2d(WIDTH, 4, 3, padding=1, padding_mode="reflect"),
        "images",
    ),
    (
        "ConvolutionPaddedByReplication",
        lambda: nn.Conv2d(WIDTH, 4, 3, padding=1, padding_mode="replicate"),
        "images",
    ),
    ("MaxPooling", lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True), "images"),
    ("AdaptivePooling", lambda: nn.AdaptiveAvgPool2d((3, 1)), "images"),
    ("AdaptiveMaxPooling", lambda: nn.AdaptiveMaxPool2d(2), "images"),
    ("FractionalMaxPooling", lambda: nn.FractionalMaxPool2d(2, output_size=3), "images"),
    ("Upsampled", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), "images"),
    ("PixelsShuffled", lambda: nn.PixelShuffle(2), "images"),
    ("ChannelsShuffled", lambda: nn.ChannelShuffle(2), "images"),
    (
        "Folded",
        lambda: nn.Sequential(nn.Unfold(3, padding=1), nn.Fold((8, 8), 3, padding=1)),
        "images",
    ),
    ("Bilinear", lambda: _Twice(nn.Bilinear(WIDTH, WIDTH, 3)), "vectors"),
    ("Prelu", lambda: nn.PReLU(WIDTH), "vectors"),
    ("TransformerEncoder", lambda: nn.TransformerEncoder(_encoder_layer(), 2), "sequences"),
    (
        "TransformerEncoderNormFirst",
        lambda: nn.TransformerEncoder(_encoder_layer(True), 2),
        "sequences",
    ),
    ("WeightNorm", lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 4)), "vectors"),
    ("OrthogonalWeight", lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), "vectors"),
    ("OldWeightNorm", lambda: _old(nn.utils.weight_norm, nn.Linear(WIDTH, 4)), "vectors"),
    ("SymmetricWeight", lambda: _symmetric(), "vectors"),
    ("NonContiguousParameter", lambda: _transposed(), "vectors"),
    ("ChannelsLastConvolution", lambda: _channels_last(), "images"),
):
    _module(_name, _make, _kind)
for _name, _make, _kind in (
    ("SpectralNorm", lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, 4)), "vectors"),
    ("OldSpectralNorm", lambda: _old(nn.utils.spectral_norm, nn.Linear(WIDTH, 4)), "vectors"),
    ("BatchNormWithCumulativeAverage", lambda: nn.BatchNorm1d(WIDTH, momentum=None), "vectors"),
    ("LazyLinear", lambda: nn.LazyLinear(4), "vectors"),
    (
        "TransformerEncoderInEvaluation",
        lambda: nn.TransformerEncoder(_encoder_layer(), 2).eval(),
        "sequences",
    ),
):
    _module(_name, _make, _kind, EITHER)


def _encoder_layer(norm_first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, norm_first=norm_first)


def _old(norm: object, layer: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: nn.Module = norm(layer)  # type: ignore[operator]
    return found


class _Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(h, h.square())
        return found


class _Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


def _symmetric() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", _Symmetric())
    return layer


def _transposed() -> nn.Module:
    layer = nn.Linear(WIDTH, 4)
    layer.weight = nn.Parameter(torch.randn(WIDTH, 4).t())
    return layer


def _channels_last() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(WIDTH, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    return layers.to(memory_format=torch.channels_last)


@idiom("images")
class ChannelsLastInTheMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(WIDTH, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.first(h.contiguous(memory_format=torch.channels_last))
        return self.second(torch.relu(h)).mean((2, 3))


@idiom("images")
class PermutedForANorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.convolution = nn.Conv2d(WIDTH, WIDTH, 3, groups=2)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.layer(self.norm(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.convolution(h)


@idiom("sequences")
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        found, weights = self.attention(h, h, h)
        return found + weights.mean()


@idiom("sequences")
class AttentionWithoutWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
        found: torch.Tensor = self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return found


@idiom("sequences")
class EncoderWithPaddingMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(_encoder_layer(), 2)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        padding = torch.zeros(h.shape[:2], dtype=torch.bool)
        padding[0, -2:] = True
        found: torch.Tensor = self.encoder(h, src_key_padding_mask=padding)
        return found


class _Recurrent(nn.Module):
    kind: type[nn.Module] = nn.LSTM
    options: dict[str, object] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.kind(WIDTH, WIDTH, batch_first=True, **self.options)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(h)[0]
        return found


@idiom("sequences")
class Lstm(_Recurrent): ...


@idiom("sequences")
class LstmBothWaysWithDropout(_Recurrent):
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.2}  # noqa: RUF012


@idiom("sequences")
class Gru(_Recurrent):
    kind = nn.GRU


@idiom("sequences")
class PlainRecurrence(_Recurrent):
    kind = nn.RNN


@idiom("sequences")
class LstmsLastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        _, (hidden, cell) = self.layer(h)
        return hidden[-1] * cell[-1]


@idiom("sequences", EITHER)
class LstmOfPackedSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((h.shape[0],), h.shape[1] - 1)
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, batch_first=True)
        found, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return found


@idiom("vectors")
class RecurrentCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.cell(h, self.cell(h))


@whole("tokens", loss=lambda: weighted_square)
class EmbeddingBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(TOKENS, WIDTH, mode="mean"), nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(ids))


@whole("tokens", EITHER, loss=lambda: weighted_square)
class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, WIDTH, sparse=True), nn.Linear(WIDTH, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))
