"""Text that is on every machine, split once and for all into what may be seen by whom.

    domain      documents
    docs        Python's documentation topics (pydoc_data.topics), one each
    python      source files of the standard library
    licences    licence texts of the installed packages
    tables      scikit-learn's tables as CSV text, a document for every 40 rows, at most 20 of a table
    headers     C and C++ header files that numpy and torch bring along

`docs` is public: the base is pretrained on it and on the public fifth of `python`. The other four are the clients'. A
document is in exactly one part of its domain (public, train, validation, test), and of documents that have half of
their lines in common only one is kept: else a copy of a test document could be trained on.

What is on a machine depends on what is installed there, and so does the corpus; on one machine it is always the same.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PUBLIC_DOMAIN = "docs"
DOMAINS = ("python", "licences", "tables", "headers")
"""The clients' domains; a domain's place here is its partition-id."""

PARTS = {
    "docs": {"public": 0.7, "train": 0.0, "validation": 0.15, "test": 0.15},
    "python": {"public": 0.2, "train": 0.5, "validation": 0.15, "test": 0.15},
    "licences": {"public": 0.0, "train": 0.7, "validation": 0.15, "test": 0.15},
    "tables": {"public": 0.0, "train": 0.7, "validation": 0.15, "test": 0.15},
    "headers": {"public": 0.0, "train": 0.7, "validation": 0.15, "test": 0.15},
}
"""Fractions of a domain's documents."""

LARGEST, SMALLEST = 48_000, 200
"""Bytes of a document: longer ones are cut off there, shorter ones are left out."""

ROWS, TABLE_DOCUMENTS = 40, 20
HEADERS_AT = (("numpy", "_core/include"), ("torch", "include/c10"), ("torch", "include/ATen/core"))


@dataclass(frozen=True)
class Document:
    """A text and its name within its domain."""

    name: str
    text: bytes

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Split:
    """A domain's documents in four disjoint parts."""

    public: tuple[Document, ...]
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]


@dataclass(frozen=True)
class Client:
    """One client's text: what it trains on, what it is judged by, and the name of its domain."""

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]


# Where the text comes from --------------------------------------------------------------------------------------------


def _folder_of(package: str) -> Path | None:
    """Where a package is installed, without importing it."""
    found = importlib.util.find_spec(package)
    where = list(found.submodule_search_locations or []) if found is not None else []
    return Path(where[0]) if where else None


def _docs() -> Iterator[Document]:
    from pydoc_data.topics import topics

    yield from (Document(name, text.encode()) for name, text in topics.items())


def _python() -> Iterator[Document]:
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        yield Document(path.name, path.read_bytes())


def _licences() -> Iterator[Document]:
    site = Path(sysconfig.get_path("purelib"))
    for path in site.glob("*.dist-info/**/*"):
        if path.is_file() and any(word in path.name.upper() for word in ("LICEN", "COPYING", "NOTICE")):
            yield Document(path.relative_to(site).as_posix(), path.read_bytes())


def _tables() -> Iterator[Document]:
    sklearn = _folder_of("sklearn")
    for path in (sklearn / "datasets" / "data").glob("*.csv*") if sklearn is not None else ():
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).splitlines(keepends=True)
        heading = [lines[0]] if re.search(rb"[A-Za-z]{2}", lines[0]) else []
        for start in range(len(heading), min(len(lines), ROWS * TABLE_DOCUMENTS), ROWS):
            rows = lines[start : start + ROWS]
            yield Document(f"{path.name.split('.')[0]}/{start}-{start + len(rows) - 1}", b"".join([*heading, *rows]))


def _headers() -> Iterator[Document]:
    for package, folder in HEADERS_AT:
        at = _folder_of(package)
        for path in (at / folder).rglob("*.h") if at is not None else ():
            yield Document(f"{package}/{path.relative_to(at).as_posix()}", path.read_bytes())


_SOURCES = {"docs": _docs, "python": _python, "licences": _licences, "tables": _tables, "headers": _headers}


# One of each, in four parts -------------------------------------------------------------------------------------------


def without_near_copies(documents: Sequence[Document]) -> list[Document]:
    """The documents of which no earlier one has half of the lines (and 6 of them, or all), or the other way round.

    Lines are compared without case, spaces and punctuation; those of fewer than 12 letters and digits do not count.
    """
    kept: list[Document] = []
    lines_of: list[set[str]] = []
    where: dict[str, list[int]] = {}
    for document in documents:
        text = document.text.decode("utf-8", "replace").lower()
        lines = {"".join(filter(str.isalnum, line)) for line in text.splitlines()}
        lines = {line for line in lines if len(line) >= 12}
        shared = Counter(at for line in lines for at in where.get(line, ()))
        if any(_is_copy(count, min(len(lines), len(lines_of[at]))) for at, count in shared.items()):
            continue
        for line in lines:
            where.setdefault(line, []).append(len(kept))
        kept.append(document)
        lines_of.append(lines)
    return kept


def _is_copy(shared: int, lines_of_the_shorter: int) -> bool:
    return shared == lines_of_the_shorter or (shared >= 6 and shared * 2 >= lines_of_the_shorter)


def dealt(documents: Sequence[Document], fractions: dict[str, float], *, key: str) -> Split:
    """The documents, shuffled by the key and cut into parts; every part with a fraction above 0 gets one at least.

    Raises:
        ValueError: if there are fewer documents than parts.
    """
    wanted = [part for part, fraction in fractions.items() if fraction > 0]
    if len(documents) < len(wanted):
        raise ValueError(
            f"{key}: {len(documents)} documents of at least {SMALLEST} bytes, wanted {len(wanted)} or more"
        )
    order = sorted(documents, key=lambda document: hashlib.blake2b(f"{key}/{document.name}".encode()).digest())
    parts: dict[str, tuple[Document, ...]] = dict.fromkeys(fractions, ())
    total, reached, start = sum(fractions.values()), 0.0, 0
    for left, part in zip(reversed(range(len(wanted))), wanted, strict=True):
        reached += fractions[part]
        stop = min(max(round(len(order) * reached / total), start + 1), len(order) - left)
        parts[part], start = tuple(order[start:stop]), stop
    return Split(**parts)


def documents(domain: str) -> list[Document]:
    """All documents of a domain, in order of name, near copies left out."""
    found = sorted(_SOURCES[domain](), key=lambda document: document.name)
    usable = [Document(each.name, each.text[:LARGEST]) for each in found if len(each) >= SMALLEST]
    return without_near_copies(usable)


@lru_cache(maxsize=16)
def split(domain: str, seed: int = 0) -> Split:
    """Who may see which document of a domain.

    Raises:
        ValueError: if this machine has too few of them.
    """
    return dealt(documents(domain), PARTS[domain], key=f"domain '{domain}', seed {seed}")


def public_documents(seed: int = 0) -> tuple[Document, ...]:
    """What the base is pretrained on."""
    return split(PUBLIC_DOMAIN, seed).public + split("python", seed).public


def validation_documents(seed: int = 0) -> dict[str, tuple[Document, ...]]:
    """The server's: held-out documents of each domain, the public one among them."""
    return {domain: split(domain, seed).validation for domain in (PUBLIC_DOMAIN, *DOMAINS)}


def limited(documents: Sequence[Document], limit: int) -> tuple[Document, ...]:
    """The first documents, up to so many bytes in all; the last one is cut off there. 0 for no limit."""
    kept: list[Document] = []
    left = limit if limit > 0 else sum(map(len, documents))
    for document in documents:
        if left <= 0:
            break
        kept.append(Document(document.name, document.text[:left]))
        left -= len(document)
    return tuple(kept)


def client(partition: int, num_partitions: int, *, seed: int = 0, train_bytes: int = 0) -> Client:
    """Client `partition`: domain partition % 4. Clients of one domain share its train documents without overlap.

    Raises:
        ValueError: if there is no such client, or it would have no document.
    """
    if not 0 <= partition < num_partitions:
        raise ValueError(f"partition-id: {partition}, wanted one in [0, {num_partitions})")
    at = partition % len(DOMAINS)
    rivals = len(range(at, num_partitions, len(DOMAINS)))
    parts = split(DOMAINS[at], seed)
    own = limited(parts.train[partition // len(DOMAINS) :: rivals], train_bytes)
    if not own:
        raise ValueError(f"num-partitions: {num_partitions} leaves client {partition} without a document")
    name = DOMAINS[at] if rivals == 1 else f"{DOMAINS[at]}-{partition // len(DOMAINS)}"
    return Client(name, own, parts.validation, parts.test)


def client_of_folder(folder: str | Path, *, seed: int = 0, train_bytes: int = 0) -> Client:
    """A client whose text is the files of a folder: 80 % of them to train on, 10 % each to validate and test.

    Raises:
        ValueError: if it has fewer than three files of at least 200 bytes that are no near copies.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"text-folder: '{root}' is no folder on this machine")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    found = [Document(path.relative_to(root).as_posix(), path.read_bytes()) for path in files]
    usable = without_near_copies([document for document in found if len(document) >= SMALLEST])
    fractions = {"public": 0.0, "train": 0.8, "validation": 0.1, "test": 0.1}
    parts = dealt(usable, fractions, key=f"text-folder '{root}'")
    return Client(root.name, limited(parts.train, train_bytes), parts.validation, parts.test)
