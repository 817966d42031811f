"""Batches for models of any kind: text, images, video, sound, time series."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .shrink import VOCABULARY

Tensors = dict[str, torch.Tensor]
Maker = Callable[[int, int], Tensors]
LENGTHS = (12, 17)


@dataclass(frozen=True)
class Batch:
    """How to make inputs and labels of so many rows, and at the first or second length (0 or 1)."""

    inputs: Maker
    labels: Maker | None = None

    def plain(self, rows: int, longer: int) -> Tensors:
        return self.inputs(rows, longer)

    def labelled(self, rows: int, longer: int) -> Tensors:
        assert self.labels is not None
        return {**self.inputs(rows, longer), **self.labels(rows, longer)}


def batches(model: Any, config: Any, head: str, taken: set[str]) -> Iterator[Batch]:
    """Yield batches that might fit a model, the likeliest first.

    Parameters
    ----------
    taken
        The names of what its forward takes.
    """
    labels = _labels(config, head, taken)
    for inputs in _inputs(model, config, head, taken):
        yield Batch(inputs, labels)


def _inputs(model: Any, config: Any, head: str, taken: set[str]) -> Iterator[Maker]:
    text, images = _text(taken), list(_images(config, head))
    sound = list(_sound(config, taken))
    if "input_ids" in taken:
        if head or "pixel_values" not in taken:
            yield text
            yield lambda rows, longer: text(rows, longer) | _decoder(rows)
        for image in images if "pixel_values" in taken else []:
            yield lambda rows, longer, image=image: text(rows, longer) | image(rows, longer)
        for wave in sound:
            yield lambda rows, longer, wave=wave: text(rows, longer) | wave(rows, longer)
    if "pixel_values" in taken or "pixel_values_videos" in taken:
        yield from images
    for wave in sound:
        yield wave
        if "decoder_input_ids" in taken:
            yield lambda rows, longer, wave=wave: wave(rows, longer) | _decoder(rows)
    if "hidden_states" in taken or "grid_thw" in taken:
        yield from _patches(config, taken)
    if "spatial_shapes" in taken:
        yield from _rows_of_patches(config)
    if "visual_feats" in taken:
        yield lambda rows, longer: text(rows, longer) | _regions(config, rows)
    if "returns_to_go" in taken:
        yield lambda rows, longer: _episodes(config, rows, LENGTHS[longer])
    if "past_values" in taken:
        yield from _series(config, taken)
    if "inputs" in taken:
        yield lambda rows, longer: {"inputs": text(rows, longer)["input_ids"]}


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(7, VOCABULARY - 21, (rows, length))


def _text(taken: set[str]) -> Maker:
    def make(rows: int, longer: int) -> Tensors:
        length = LENGTHS[longer]
        found = {"input_ids": _ids(rows, length)}
        if "attention_mask" in taken:
            mask = torch.ones(rows, length, dtype=torch.int64)
            mask[0, -3:] = 0
            found["attention_mask"] = mask
        if "bbox" in taken:
            corner = torch.randint(0, 60, (rows, length, 2))
            found["bbox"] = torch.cat([corner, corner + 20], -1)
        if "xpath_tags_seq" in taken:
            found["xpath_tags_seq"] = torch.randint(0, 5, (rows, length, 50))
            found["xpath_subs_seq"] = torch.randint(0, 5, (rows, length, 50))
        return found

    return make


def _decoder(rows: int) -> Tensors:
    return {"decoder_input_ids": _ids(rows, 7)}


def image_sizes(config: Any) -> tuple[int, int]:
    """Return an image's channels and size."""
    own = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None)
    own = own if own is not None and not hasattr(config, "image_size") else config
    channels = getattr(own, "num_channels", None) or getattr(own, "in_channels", None) or 3
    size = getattr(own, "image_size", None) or 64
    size = size[0] if isinstance(size, (list, tuple)) else size
    return (channels if isinstance(channels, int) else 3), (size if isinstance(size, int) else 64)


def _images(config: Any, head: str) -> Iterator[Maker]:
    channels, size = image_sizes(config)
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or 4

    def image(rows: int, longer: int) -> Tensors:
        return {"pixel_values": torch.randn(rows, channels, size, size)}

    def video(rows: int, longer: int) -> Tensors:
        return {"pixel_values": torch.randn(rows, frames, channels, size, size)}

    def clip(rows: int, longer: int) -> Tensors:
        return {"pixel_values_videos": torch.randn(rows, frames, channels, size, size)}

    yield from (video, image, clip) if head == "VIDEO_CLASSIFICATION" else (image, video, clip)


def _sound(config: Any, taken: set[str]) -> Iterator[Maker]:
    own = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins = next(
        (
            value
            for name in ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim")
            if isinstance(value := getattr(own, name, None), int) and value > 1
        ),
        16,
    )
    steps = getattr(own, "max_source_positions", None) or 32
    steps = 2 * steps if isinstance(steps, int) and steps < 4096 else 64
    if "input_values" in taken:
        yield lambda rows, longer: {"input_values": torch.randn(rows, (3200, 4800)[longer])}
        yield lambda rows, longer: {"input_values": torch.randn(rows, 1, (3200, 4800)[longer])}
        length = getattr(config, "max_length", None) or 64
        yield lambda rows, longer: {"input_values": torch.randn(rows, length, bins)}
    if "input_features" in taken:
        fits = "attention_mask" in taken and "input_ids" not in taken

        def features(*shape: int) -> Tensors:
            found = {"input_features": torch.randn(*shape)}
            if fits:
                found["attention_mask"] = torch.ones(shape[0], shape[1], dtype=torch.int64)
            return found

        yield lambda rows, longer: features(rows, (64, 96)[longer], bins)
        yield lambda rows, longer: {"input_features": torch.randn(rows, bins, steps)}
        yield lambda rows, longer: {"input_features": torch.randn(rows, bins, 64)}


def _patches(config: Any, taken: set[str]) -> Iterator[Maker]:
    """Vision towers that take a row of patches, and a grid that says whose they are."""
    patch = getattr(config, "patch_size", 8)
    width = (getattr(config, "in_channels", None) or 3) * patch * patch
    width *= getattr(config, "temporal_patch_size", 1)
    if "grid_thw" in taken:
        grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
        for name in {"hidden_states", "pixel_values"} & taken:
            yield lambda rows, longer, name=name: {name: torch.randn(32, width), "grid_thw": grid}
    size = getattr(config, "hidden_size", 32)
    yield lambda rows, longer: {"hidden_states": torch.randn(rows, LENGTHS[longer], size)}


def _rows_of_patches(config: Any) -> Iterator[Maker]:
    """Images as rows of patches, with their sides in patches."""
    own = getattr(config, "vision_config", config)
    width = own.num_channels * own.patch_size**2

    def make(rows: int, longer: int) -> Tensors:
        return {
            "pixel_values": torch.randn(rows, 16, width),
            "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.int64),
            "spatial_shapes": torch.full((rows, 2), 4),
        }

    yield make


def _regions(config: Any, rows: int) -> Tensors:
    """What a detector says of regions of an image, and where they are."""
    return {
        "visual_feats": torch.randn(rows, 6, config.visual_feat_dim),
        "visual_pos": torch.rand(rows, 6, config.visual_pos_dim),
    }


def _episodes(config: Any, rows: int, length: int) -> Tensors:
    """States, actions and rewards of an agent."""
    return {
        "states": torch.randn(rows, length, config.state_dim),
        "actions": torch.randn(rows, length, config.act_dim),
        "rewards": torch.randn(rows, length, 1),
        "returns_to_go": torch.randn(rows, length, 1),
        "timesteps": torch.arange(length).repeat(rows, 1),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
    }


def _series(config: Any, taken: set[str]) -> Iterator[Maker]:
    length = getattr(config, "context_length", None) or 32
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", None) or 1

    def channelled(rows: int, longer: int) -> Tensors:
        return {"past_values": torch.randn(rows, length, channels)}

    def windowed(rows: int, longer: int) -> Tensors:
        past, future = length + lags, getattr(config, "prediction_length", None) or 4
        features = getattr(config, "num_time_features", 0)
        return {
            "past_values": torch.randn(rows, past),
            "past_time_features": torch.randn(rows, past, features),
            "past_observed_mask": torch.ones(rows, past),
            "future_values": torch.randn(rows, future),
            "future_time_features": torch.randn(rows, future, features),
        }

    def flat(rows: int, longer: int) -> Tensors:
        return {"past_values": torch.randn(rows, length)}

    yield from (windowed, channelled, flat)


def _labels(config: Any, head: str, taken: set[str]) -> Maker | None:
    if "labels" not in taken:
        return None
    _, size = image_sizes(config)

    def classes(rows: int, longer: int) -> Tensors:
        return {"labels": torch.randint(0, 2, (rows,))}

    def tokens(rows: int, longer: int) -> Tensors:
        return {"labels": _ids(rows, LENGTHS[longer])}

    def answer(rows: int, longer: int) -> Tensors:
        return {"labels": _ids(rows, 7)}

    def areas(rows: int, longer: int) -> Tensors:
        return {"labels": torch.randint(0, 2, (rows, size, size))}

    return {
        "MASKED_LM": tokens,
        "IMAGE_TEXT_TO_TEXT": tokens,
        "MULTIMODAL_LM": tokens,
        "SEQ_TO_SEQ_CAUSAL_LM": answer,
        "SPEECH_SEQ_2_SEQ": answer,
        "CTC": answer,
        "SEMANTIC_SEGMENTATION": areas,
        "IMAGE_CLASSIFICATION": classes,
        "VIDEO_CLASSIFICATION": classes,
        "AUDIO_CLASSIFICATION": classes,
        "SEQUENCE_CLASSIFICATION": classes,
    }.get(head)
