"""The models that a recipe names: folders of Hugging Face libraries, safetensors files, names on the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fl_merge.adapters import ADAPTER_FILE, FoldedSource, is_adapter, load_adapter
from fl_merge.architectures import Architecture, architecture_of, depth_of
from fl_merge.errors import RecipeError, one_line
from fl_merge.offline.config import Ref
from fl_merge.store import INDEX_FILE, SINGLE_FILE, SafetensorsSource
from fl_merge.types import TensorSource

_LOG = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Model:
    """One model that is read.

    Args:
        ref: as the recipe names it.
        path: the folder or the file.
        source: its tensors.
        config: of config.json; None for plain tensors.
        adapter: the folder of the adapter that is folded into its tensors.
    """

    ref: Ref
    path: Path
    source: TensorSource
    config: Mapping[str, Any] | None
    adapter: Path | None = None

    @cached_property
    def architecture(self) -> Architecture:
        """What its tensors are."""
        return architecture_of(self.config, self.source.specs())

    @cached_property
    def depth(self) -> int:
        """How many layers it has."""
        return depth_of(self.architecture, self.source.specs())

    @property
    def folder(self) -> Path | None:
        """Where config and tokenizer are; None for a file of plain tensors."""
        return self.path if self.path.is_dir() else None

    def stored_as(self, name: str) -> str | None:
        """The name under which the file has a tensor: its own, or the embedding's for a head that is tied to it."""
        if name in self.source.specs():
            return name
        row = self.architecture
        tied = name == row.head and row.tied in self.source.specs() and (self.config or {}).get("tie_word_embeddings")
        return row.tied if tied else None

    def vocabulary(self) -> Mapping[str, int] | None:
        """The tokens and their rows in the embeddings, as far as a file in the folder says; None if none does."""
        if self.folder is None:
            return None
        for name in ("tokenizer.json", "vocab.json"):
            content = _json(self.folder / name)
            if content is None:
                continue
            model = content.get("model", {}) if name == "tokenizer.json" else {"vocab": content}
            found = model.get("vocab", {}) if isinstance(model, Mapping) else {}
            listed = found.items() if isinstance(found, Mapping) else ((e[0], row) for row, e in enumerate(found))
            added = content.get("added_tokens", []) if name == "tokenizer.json" else []
            return dict(listed) | {token["content"]: token["id"] for token in added}
        return None

    def files(self) -> list[Path]:
        """The safetensors files that are read."""
        if self.path.is_file() and self.path.suffix != ".json":
            return [self.path]
        index = self.path if self.path.is_file() else self.path / INDEX_FILE
        if not index.is_file():
            return [self.path / SINGLE_FILE]
        return sorted({index.parent / shard for shard in json.loads(index.read_text())["weight_map"].values()})

    def hashes(self) -> Iterator[tuple[str, str]]:
        """The name of each file and its SHA-256."""
        for path in [*self.files(), *([self.adapter / ADAPTER_FILE] if self.adapter is not None else [])]:
            with open(path, "rb") as file:
                yield path.name, hashlib.file_digest(file, "sha256").hexdigest()


def open_model(ref: Ref, beside: Path | None = None) -> Model:
    """Open a model that a recipe names. Nothing is read but headers and config.json.

    Args:
        ref: which.
        beside: the recipe's folder: where a path is looked for that is not below the working directory.

    Raises:
        RecipeError: if there is no such model, with what was looked for.
        DecodeError: if a file is not what it claims to be.
    """
    path = _beside(ref.path, beside)
    if ref.lora is not None:
        bare = open_model(Ref(ref.path, ref.revision), beside)
        folder = _beside(ref.lora.path, beside)
        if not os.path.exists(folder):
            folder = _from_hub(ref.lora)
        return replace(bare, ref=ref, source=FoldedSource(bare.source, load_adapter(folder), bare.path), adapter=folder)
    there = os.path.exists(path)  # unlike Path's, no error for a name that is too long
    if there and is_adapter(path) and not (path / INDEX_FILE).is_file() and not (path / SINGLE_FILE).is_file():
        raise RecipeError(
            f"'{ref.path}' is an adapter; name it with its model, as model+{ref.path}, or merge adapters by themselves "
            "with a method for adapters (merge_method: lora_svd)"
        )
    if not there:
        path = _from_hub(ref)
    elif ref.revision is not None:
        raise RecipeError(f"model '{ref}': '{path}' is on this machine, where there are no revisions; leave it out")
    config = _json(path / "config.json") if path.is_dir() else None
    return Model(ref, path, SafetensorsSource(path), config)


def _beside(name: str, beside: Path | None) -> Path:
    path = Path(name).expanduser()
    away = beside is not None and not path.is_absolute() and not os.path.exists(path)
    if beside is not None and away and os.path.exists(beside / path):
        return beside / path
    return path


def _from_hub(ref: Ref) -> Path:
    """The folder into which huggingface_hub puts a model, or has put it before."""
    if not _HUB_NAME.fullmatch(ref.path):
        raise RecipeError(f"no such model: '{ref.path}' (wanted a folder, a .safetensors file, or owner/name of a hub)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RecipeError(
            f"no such folder: '{ref.path}'; to fetch a model of that name from the Hugging Face hub, "
            "pip install huggingface_hub"
        ) from None
    _LOG.warning("'%s' is no folder here: asking the Hugging Face hub for it", ref.path)  # minutes, without a network
    try:
        return Path(snapshot_download(ref.path, revision=ref.revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # no network, no such name, no permission: of many classes
        raise RecipeError(
            f"no such folder: '{ref.path}', and the Hugging Face hub did not give a model of that name "
            f"({type(error).__name__}: {one_line(str(error), 120)}); offline, fetch it elsewhere with "
            f"'hf download {ref.path}' and name the folder"
        ) from None


def _json(path: Path) -> Mapping[str, Any] | None:
    """What a JSON file holds; None if there is none.

    Raises:
        RecipeError: if it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read '{path}': {error}") from None
    if not isinstance(content, Mapping):
        raise RecipeError(f"'{path}': found {type(content).__name__}, wanted a JSON object")
    return content
