"""A GPT in plain torch, small enough to read: what the demo, an example and a benchmark train."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

INITIAL_STD = 0.02


class CausalAttention(nn.Module):
    """Multi-head attention to the positions before, and to one's own."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, D) to (B, T, D)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        projected: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Attention, then a perceptron: each normalises its input, and adds to it."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, D) to (B, T, D)
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        mixed: Tensor = hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))
        return mixed


class GPT(nn.Module):
    """A pre-norm GPT with learned positions and a head of its own.

    Parameters
    ----------
    width
        Size of a hidden state, D; a multiple of `num_heads`.
    context
        The longest sequence it takes.

    References
    ----------
    Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3, for
    the architecture and the start values. The head isn't tied to the embedding, so that the first
    stage and the last share no weights.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        context: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is no multiple of num_heads {num_heads}")
        self.context = context
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self._initialise(num_layers)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy in nats a token; without labels the logits, ``(B, T, V)``.

        Parameters
        ----------
        input_ids
            ``(B, T)``, T at most `context`.
        labels
            ``(B, T)``: the token that follows each of `input_ids`; nothing is shifted here.
        """
        hidden = self.dropout(self.embedding(input_ids) + self.positions[: input_ids.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        if labels is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _initialise(self, num_layers: int) -> None:
        nn.init.normal_(self.positions, std=INITIAL_STD)
        # 2 additions a block to the residual stream: its variance must not grow with depth.
        residual_std = INITIAL_STD / math.sqrt(2 * num_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds_to_stream = name.endswith((".attention.output", ".mlp.2"))
                std = residual_std if adds_to_stream else INITIAL_STD
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def mean_loss(model: GPT, tokens: Tensor, num_windows: int = 64) -> float:
    """Return the mean cross-entropy in nats over windows spread evenly over ``(N,)`` tokens."""
    last = len(tokens) - model.context - 1
    offsets = torch.linspace(0, last, num_windows, dtype=torch.float64).long()
    windows = torch.stack([tokens[o : o + model.context + 1] for o in offsets.tolist()]).long()
    return float(model(windows[:, :-1], windows[:, 1:]))


@torch.no_grad()
def sample(
    model: GPT, prompt_ids: Tensor, num_tokens: int, temperature: float = 0.8, seed: int = 0
) -> Tensor:
    """Return ``(T,)`` tokens, continued: the same for the same seed.

    The model sees the last `context` of them. A `temperature` of 0 takes the likeliest token.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = prompt_ids
    for _ in range(num_tokens):
        logits = model(tokens[None, -model.context :])[0, -1].float()
        tokens = torch.cat([tokens, _draw(logits, temperature, generator)])
    model.train(was_training)
    return tokens


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature <= 0:
        return logits.argmax(keepdim=True)
    probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).to(logits.device)
