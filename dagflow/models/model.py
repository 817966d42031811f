"""Language models in the store: weights by content, a captured decoder, a tokenizer.

::

    weights/3f9a....json             where a group of tensors lies (a layer's, mostly)
    weights/3f9a....-<random>/       its arrays
    models/<name>/model.json         written last: configuration and groups
    models/<name>/decoder.json       the operator DAG
    models/<name>/tokenizer/...      as they were found

Groups are named by a hash of what they hold: importing the same weights again writes nothing, and
fine-tunes share what they haven't changed. A model's name ends with a hash of all that decides its
answers, so a model in the store never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

import torch

from dagflow.arguments import shown
from dagflow.errors import BatchInvalid, SettingsInvalid
from dagflow.graph.dag import OperatorDag
from dagflow.graph.decoder import without_head
from dagflow.models.defaults import sampling_defaults
from dagflow.models.groups import checked_group
from dagflow.models.text import Detokenizer
from dagflow.models.tokenizing import encode_text, is_tokenizer, open_tokenizer
from dagflow_storage import Store, read_arrays
from dagflow_storage.place import fields
from dagflow_storage.place.bounded_json import parse_json
from dagflow_storage.place.documents import sound
from dagflow_tasks.decode.decoder_stage import DecoderStage
from dagflow_tasks.program.packing import pack_linears
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.train.state import from_array


@dataclass(frozen=True)
class ModelRef:
    """A model in a store."""

    store: Store
    name: str


@dataclass(frozen=True)
class Model:
    """A language model that can be run on a swarm; `load` returns one.

    Attributes
    ----------
    ref : ModelRef
    description : mapping
        What the store says of it.
    has_head : bool
        Without its head a model returns hidden states where it would return logits.
    """

    ref: ModelRef
    description: Mapping[str, Any]
    has_head: bool = True

    @classmethod
    def open(cls, store: Store | str | Path, name: str) -> Model:
        """Return a model that was loaded before into a store, or a folder or URL of one.

        Raises
        ------
        NotFound
            If the store has none of this name.
        DamagedData
            If what it has describes no model.
        """
        store = store if isinstance(store, Store) else Store(str(store))
        path = f"models/{name}/model.json"
        text = store.read_bytes(path)
        with sound(f"{path} in {store!r} describes no model"):
            return cls(ModelRef(store, name), _checked(parse_json(text, finite=False)))

    @cached_property
    def dag(self) -> OperatorDag:
        path = f"models/{self.ref.name}/decoder.json"
        text = self.ref.store.read_bytes(path)
        with sound(f"{path} in {self.ref.store!r} holds no operator DAG"):
            dag = OperatorDag.from_json(text.decode("utf-8"))
        return dag if self.has_head else without_head(dag)

    def without_head(self) -> Model:
        """Return the same model, with hidden states (after the last norm) for results."""
        return replace(self, has_head=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration, as transformers has it."""
        found: Mapping[str, Any] = self.description["config"]
        return found

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model was made for."""
        found = self.description["max_tokens"]
        return int(found) if found else None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self.description["end_tokens"])

    @property
    def generation(self) -> Mapping[str, Any]:
        """What the model's generation_config.json sets; a model loaded by an older dagflow has none."""
        found: Mapping[str, Any] = self.description.get("generation", {})
        return found

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Options of `Sampling` that apply unless a call says otherwise: the model's own."""
        return sampling_defaults(self.generation)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was said when the model was loaded."""
        return tuple(self.description.get("notes", ()))

    @property
    def has_tokenizer(self) -> bool:
        return is_tokenizer(self._tokenizer_files)

    @cached_property
    def _tokenizer_files(self) -> list[str]:
        if "tokenizer_files" in self.description:
            return list(self.description["tokenizer_files"])
        return self.ref.store.list(f"models/{self.ref.name}/tokenizer")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers.

        Raises
        ------
        SettingsInvalid
            If the model has none, or it can't be opened.
        """
        if not self.has_tokenizer:
            raise SettingsInvalid(
                f"The model {self.ref.name!r} has no tokenizer: its folder had none. Pass prompts as "
                "token ids, or load it from a folder with tokenizer.json."
            )
        place = f"models/{self.ref.name}/tokenizer"
        files = {n: self.ref.store.read_bytes(f"{place}/{n}") for n in self._tokenizer_files}
        return open_tokenizer(self.ref.name, files)

    def encode(self, text: str | Sequence[int] | torch.Tensor) -> tuple[int, ...]:
        """Return a text's token ids; ids themselves are checked.

        Raises
        ------
        BatchInvalid
            If it is neither, an id isn't in the vocabulary, or the text isn't Unicode.
        """
        if isinstance(text, str):
            tokens = tuple(encode_text(self.tokenizer, text)) if text else ()
        else:
            tokens = _ids(text)
        wrong = self.first_unknown(tokens)
        if wrong is not None:
            raise BatchInvalid(
                f"The prompt holds token {shown(wrong)}; the vocabulary has "
                f"{self.config['vocab_size']}."
            )
        return tokens

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """Return the text of tokens that follow on others, without end tokens.

        The same as an answer's pieces together; empty without a tokenizer.
        """
        if not self.has_tokenizer:
            return ""
        detokenizer = Detokenizer(self.tokenizer, after)
        return "".join([*map(detokenizer.add, tokens), detokenizer.rest()])

    def first_unknown(self, tokens: Iterable[int]) -> int | None:
        """Return the first token that isn't in the vocabulary."""
        size = int(self.config.get("vocab_size") or 0)
        return next((token for token in tokens if not 0 <= token < (size or token + 1)), None)


def _ids(given: Any) -> tuple[int, ...]:
    """Return token ids as Python's integers."""
    tokens = given.tolist() if isinstance(given, torch.Tensor) else given
    try:
        return tuple(map(index, tokens))
    except TypeError:
        raise BatchInvalid(
            f"A prompt is a text, or whole numbers that are token ids; found {shown(given)}."
        ) from None


def _checked(description: Any) -> dict[str, Any]:
    """Return what a store says of a model; raises ValueError if it can't be that."""
    given = fields.members(description, "it", "config", "max_tokens", "groups", "end_tokens")
    config = fields.members(given["config"], "config")
    fields.integer(config.get("vocab_size") or 0, "vocab_size")
    fields.integer(given["max_tokens"] or 0, "max_tokens")
    fields.members(given.get("generation", {}), "generation")
    for group in fields.items(given["groups"], "groups"):
        checked_group(group)
    for token in fields.items(given["end_tokens"], "end_tokens"):
        fields.integer(token, "an end token")
    for file in fields.items(given.get("tokenizer_files", []), "tokenizer_files"):
        fields.path(file, "a file of the tokenizer")
    for note in fields.items(given.get("notes", []), "notes"):
        fields.text(note, "a note")
    return dict(given)


def read_stage(ref: ModelRef, program: StageProgram, device: torch.device) -> DecoderStage:
    """Read a stage's weights, and make it ready to take passes."""
    weights = read_weights(ref, program, device)
    return DecoderStage(pack_linears(program, weights), device, weights)


def read_weights(
    ref: ModelRef, program: StageProgram, device: torch.device
) -> dict[str, torch.Tensor]:
    """Read what a stage uses, its own or not: parameters and buffers by name."""
    wanted = {use.parameter for use in program.parameters} | {u.buffer for u in program.buffers}
    found: dict[str, torch.Tensor] = {}
    for group in Model.open(ref.store, ref.name).description["groups"]:
        _, arrays = checked_group(group)
        here = [array for array in arrays if array.name in wanted]
        if here:
            dtypes = {array.name: array.dtype for array in here}
            for name, array in read_arrays(ref.store, group["path"], here).items():
                found[name] = from_array(array, dtypes[name]).to(device)
    return found
