"""Small, randomly initialised models of every kind that dagflow must train, with their batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Example:
    """A model, how to make a batch for it, and its loss function if it has none.

    `batch` takes the number of rows and, for models of sequences, their length.
    """

    model: nn.Module
    batch: Callable[..., Any]
    loss: Callable[[Any, Any], torch.Tensor] | None = None

    def eager_loss(self, batch: Any) -> torch.Tensor:
        """The loss without dagflow."""
        if self.loss is not None:
            features, target = batch
            return self.loss(self.model(features), target)
        loss: torch.Tensor = self.model(**batch).loss
        return loss


# A first, a last, and one between them; who cuts between layers asks for more.
_LAYERS = 3


def _sizes(num_layers: int) -> dict[str, int]:
    return {**SIZES, "num_hidden_layers": num_layers}


def _tokens(rows: int, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (rows, length))
    return {"input_ids": ids, "labels": ids}


# Without a mask transformers takes another attention kernel while it is traced than when it runs,
# and the gradients of grouped-query attention differ by rounding; with one both take the same.
def _padded(rows: int, length: int = 12) -> dict[str, torch.Tensor]:
    batch = _tokens(rows, length)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = 0
    return {**batch, "attention_mask": mask}


def _images(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32), "labels": torch.arange(rows) % 5}


def gpt2(num_layers: int = _LAYERS) -> Example:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=num_layers, n_head=4, n_positions=64)
    return Example(GPT2LMHeadModel(config), _tokens)


def llama(num_layers: int = _LAYERS) -> Example:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_sizes(num_layers), num_key_value_heads=2, attention_dropout=0.1)
    return Example(LlamaForCausalLM(config), _padded)


def qwen3(num_layers: int = _LAYERS) -> Example:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_sizes(num_layers), num_key_value_heads=2, head_dim=8, attention_dropout=0.1
    )
    return Example(Qwen3ForCausalLM(config), _padded)


def gemma3(num_layers: int = _LAYERS) -> Example:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_sizes(num_layers), num_key_value_heads=2, head_dim=8, attention_dropout=0.1
    )
    return Example(Gemma3ForCausalLM(config), _padded)


def mixtral(num_layers: int = _LAYERS) -> Example:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **_sizes(num_layers), num_key_value_heads=2, num_local_experts=4, attention_dropout=0.1
    )
    return Example(MixtralForCausalLM(config), _padded)


def opt(num_layers: int = _LAYERS) -> Example:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return Example(OPTForCausalLM(config), _tokens)


def bloom(num_layers: int = _LAYERS) -> Example:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=96,
        hidden_size=32,
        n_layer=num_layers,
        n_head=4,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return Example(BloomForCausalLM(config), _tokens)


def bert(num_layers: int = _LAYERS) -> Example:
    from transformers import BertConfig, BertForMaskedLM

    def batch(rows: int, length: int = 12) -> dict[str, torch.Tensor]:
        tokens = _padded(rows, length)
        labels = tokens["labels"].clone()
        labels[:, ::2] = -100
        return {**tokens, "labels": labels}

    return Example(BertForMaskedLM(BertConfig(**_sizes(num_layers))), batch)


def t5() -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )

    def batch(rows: int, length: int = 12) -> dict[str, torch.Tensor]:
        labels = _tokens(rows, length - 4)["labels"]
        return {"input_ids": _tokens(rows, length)["input_ids"], "labels": labels}

    return Example(T5ForConditionalGeneration(config), batch)


def vit(num_layers: int = _LAYERS) -> Example:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return Example(ViTForImageClassification(config), _images)


def resnet() -> Example:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=5)
    return Example(ResNetForImageClassification(config), _images)


class Normed(nn.Module):
    """Two convolutions with batch norms and a residual connection: what a ResNet is, captured in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norms[0](self.first(images)))
        hidden = hidden + torch.relu(self.norms[1](self.second(hidden)))
        output: torch.Tensor = self.head(hidden.mean((2, 3)))
        return output


def normed() -> Example:
    """Return a small model with batch norms, in training mode; tests of kinds of models have resnet."""
    torch.manual_seed(0)

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, 3, 8, 8), torch.arange(rows) % 5

    return Example(Normed(), batch, nn.functional.cross_entropy)


class LstmTagger(nn.Module):
    """Two stacked LSTMs with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 32)
        self.first = nn.LSTM(32, 32, num_layers=2, batch_first=True, dropout=0.2)
        self.second = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 96)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.first(self.embedding(ids))
        more, _ = self.second(hidden)
        logits: torch.Tensor = self.head(hidden + more)
        return logits


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def lstm() -> Example:
    def batch(rows: int, length: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 96, (rows, length)), torch.randint(0, 96, (rows, length))

    return Example(LstmTagger(), batch, token_loss)


class TwoBranches(nn.Module):
    """Two branches from one stem, with skip connections that cross several stages."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(16, width)
        self.left = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.right = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        stem = torch.relu(self.stem(features))
        left = right = stem
        for layer in self.left:
            left = self.dropout(torch.tanh(layer(left))) + stem
        for layer in self.right:
            right = torch.relu(layer(right)) + stem
        output: torch.Tensor = self.head(left * right + stem)
        return output


def two_branches() -> Example:
    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rows, 16), torch.randint(0, 3, (rows,))

    return Example(TwoBranches(), batch, nn.functional.cross_entropy)


ZOO: dict[str, Callable[..., Example]] = {
    function.__name__: function
    for function in (
        gpt2,
        llama,
        qwen3,
        gemma3,
        mixtral,
        opt,
        bloom,
        bert,
        t5,
        vit,
        resnet,
        lstm,
        two_branches,
    )
}


# Of the same kind as others, as far as capturing and cutting go.
SIMILAR = frozenset({"qwen3", "opt", "gemma3", "vit", "bert"})


def build(name: str, seed: int = 0, **sizes: int) -> Example:
    """Build a model of the zoo from a seed, in training mode; `sizes` are its function's."""
    torch.manual_seed(seed)
    example = ZOO[name](**sizes)
    example.model.train()
    return example


@cache
def captured(name: str, *, dropout: bool = True) -> OperatorDag:
    """Capture a model of the zoo, dropout and all or without, once a run of the tests."""
    from once import once  # beside this package: `python -m tests.zoo` finds it later

    example = build(name)
    if not dropout:
        without_dropout(example.model)
    return once(f"zoo {name} {dropout}", lambda: capture_example(example))


def capture_example(example: Example) -> OperatorDag:
    """Capture an example's model from a batch of three rows."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # transformers' BLOOM has a hand-written backward for its GELU, which is its derivative.
        warnings.filterwarnings("ignore", message=".*GeLUFunction.*", category=UserWarning)
        return capture(example.model, example.batch(3), loss=example.loss)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch every kind of dropout in a model off, leaving it in training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.LSTM):
            module.dropout = 0.0
        for attribute in ("attention_dropout", "hidden_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model
