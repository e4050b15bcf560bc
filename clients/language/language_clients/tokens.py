"""Text as tokens: bytes without any download, or the tokenizer of a Hugging Face model.

Shape suffixes: T tokens of a text, B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from language_clients.corpus import Document

NUM_BYTES = 256
DOCUMENT, PADDING = 256, 257
VOCABULARY = 258
"""A byte is its own token; before each document stands a token of its own, which is also the end of the one before."""

SPECIALS = {"<|document|>": DOCUMENT, "<|padding|>": PADDING}


@dataclass(frozen=True)
class Tokens:
    """Documents as one row of tokens.

    Args:
        ids_T: (T,) int64.
        bytes_T: (T,) float32: how many bytes of text each token stands for; 0 for the one before a document.
    """

    ids_T: Tensor
    bytes_T: Tensor

    def __len__(self) -> int:
        return len(self.ids_T)


class Tokenizer(Protocol):
    """From documents to tokens.

    Args:
        num_bytes: 256 where tokens 0 to 255 are the bytes and text has no others; None for any other vocabulary.
    """

    num_bytes: int | None

    def __call__(self, documents: Sequence[Document]) -> Tokens:
        """The documents one after the other, a separator before each."""
        ...


class Bytes:
    """A byte is a token."""

    num_bytes: int | None = NUM_BYTES

    def __call__(self, documents: Sequence[Document]) -> Tokens:
        """The documents one after the other, `DOCUMENT` before each."""
        ids, counts = [], []
        for document in documents:
            text_T = torch.frombuffer(bytearray(document.text), dtype=torch.uint8).to(torch.int64)
            ids += [torch.tensor([DOCUMENT]), text_T]
            counts += [torch.zeros(1), torch.ones(len(text_T))]
        return Tokens(torch.cat(ids), torch.cat(counts))


class HuggingFace:
    """A transformers tokenizer.

    Args:
        tokenizer: from `AutoTokenizer`. With a fast one each token is charged its own bytes, else all alike.
    """

    num_bytes: int | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        self._separator = next(token for token in found if token is not None)

    def __call__(self, documents: Sequence[Document]) -> Tokens:
        """The documents one after the other, the tokenizer's own first (else last) token before each."""
        ids, counts = [], []
        for document in documents:
            text = document.text.decode("utf-8", "replace")
            fast = bool(getattr(self._tokenizer, "is_fast", False))
            found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
            size = len(text.encode())
            spans = found["offset_mapping"] if fast else ()
            share = [size / max(len(found["input_ids"]), 1)] * len(found["input_ids"])
            ids += [self._separator, *found["input_ids"]]
            counts += [0.0, *(_bytes_of(text, spans) if fast else share)]
        return Tokens(torch.tensor(ids, dtype=torch.int64), torch.tensor(counts))


def _bytes_of(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[float]:
    """The bytes that each token adds to those before it: together all of the text, spaces between tokens included."""
    done = 0
    for _, stop in spans:
        yield float(len(text[done:stop].encode()) if stop > done else 0)
        done = max(done, stop)


def batches(tokens: Tokens, *, batch_size: int, length: int, steps: int, key: object) -> Iterator[Tensor]:
    """Training batches (B, length + 1) of tokens, cut out of the row at places drawn from the key alone.

    Raises:
        ValueError: if the text is shorter than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"a text of {len(tokens)} tokens, wanted 2 or more")
    length = min(length, len(tokens) - 1)
    draws, windows_L = seeded("batches", key), torch.arange(length + 1)
    for _ in range(steps):
        starts_B = torch.randint(len(tokens) - length, (batch_size,), generator=draws)
        yield tokens.ids_T[starts_B[:, None] + windows_L]


def windows(tokens: Tokens, *, length: int, limit: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences to evaluate on, evenly spread over the row and without overlap, of about `limit` bytes in all.

    Yields:
        (L + 1,) ids, and (L,) how many bytes each predicted token stands for.
    """
    starts = list(range(0, len(tokens) - 1, length))
    bytes_a_window = float(tokens.bytes_T.sum()) / max(len(starts), 1)
    wanted = min(len(starts), max(1, int(limit / max(bytes_a_window, 1e-9))))
    for at in range(wanted):
        start = starts[at * len(starts) // wanted]
        ids = tokens.ids_T[start : start + length + 1]
        yield ids, tokens.bytes_T[start + 1 : start + len(ids)]


def seeded(*key: object) -> torch.Generator:
    """A generator whose draws depend on the key alone: the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def save_byte_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json`, so that `AutoTokenizer.from_pretrained(folder)` gives the same tokens as `Bytes`."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    letters = _letters_of_bytes()
    fast = Fast(models.BPE(vocab={letters[byte]: byte for byte in range(NUM_BYTES)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    fast.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|document|>",
        "eos_token": "<|document|>",
        "pad_token": "<|padding|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _letters_of_bytes() -> list[str]:
    """The printable characters that stand for bytes in byte-level vocabularies: printable bytes for themselves, the
    others for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]
