"""The base that a federation starts from: a model of Hugging Face's, or a small one that is pretrained here.

The small one is Llama-shaped and reads bytes. It is pretrained on public text (`corpus.public_documents`) in a minute
or two, and kept in the cache folder as a checkpoint like any other, under a name that is a hash of the text and of all
settings that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from language_clients import corpus
from language_clients.settings import Settings
from language_clients.tokens import DOCUMENT, PADDING, VOCABULARY, Bytes, HuggingFace, Tokenizer, save_byte_tokenizer
from language_clients.training import finetune

logger = logging.getLogger("flwr")

VERSION = 1
"""To be raised when pretraining changes in a way that the settings do not show."""

SEQUENCE, BATCH, RATE = 128, 8, 4e-3
"""Of the pretraining: tokens a sequence, sequences a step, AdamW's largest learning rate."""


def folder(settings: Settings) -> str:
    """Where the base is: what the settings name, or the folder of the small one, pretrained first if need be."""
    return settings.model or str(_pretrained(settings))


def load(settings: Settings, dtype: torch.dtype | str = torch.float32) -> Any:
    """The base as a transformers model, in evaluation mode.

    Args:
        settings: which.
        dtype: of its weights; "auto" for that of the checkpoint.

    Raises:
        ValueError: if it is neither on this machine nor to be had from the Hugging Face Hub; says what to do.
    """
    where = folder(settings)
    try:
        return _transformers().AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval()
    except (OSError, ValueError) as problem:
        raise _not_found(where, problem) from problem


def config(settings: Settings) -> Any:
    """The base's config, of transformers.

    Raises:
        ValueError: as `load`.
    """
    where = folder(settings)
    try:
        return _transformers().AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as problem:
        raise _not_found(where, problem) from problem


def tokenizer(settings: Settings) -> Tokenizer:
    """How the base reads text.

    Raises:
        ValueError: as `load`.
    """
    if not settings.model:
        return Bytes()
    try:
        return HuggingFace(_transformers().AutoTokenizer.from_pretrained(settings.model))
    except (OSError, ValueError) as problem:
        raise _not_found(settings.model, problem) from problem


def _transformers() -> Any:
    """The library, without its progress bars; its import takes seconds, and only who has a model pays for it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def _not_found(where: str, problem: Exception) -> ValueError:
    first = " ".join(str(problem).split())[:200]
    if Path(where).expanduser().is_dir():
        return ValueError(f"model: '{where}' holds no causal language model that transformers can load: {first}")
    return ValueError(
        f"model: '{where}' is no folder here and could not be fetched ({type(problem).__name__}: {first}). Without a "
        f"network: run `hf download {where} --local-dir FOLDER` where there is one, copy the folder to the server and "
        "to every client, and set model to its path"
    )


def small_config(settings: Settings) -> Any:
    """The config of the small model: Llama, `layers` x `hidden`, heads of 32 (fewer where hidden is smaller)."""
    heads = max(1, settings.hidden // 32)
    return _transformers().LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        bos_token_id=DOCUMENT,
        eos_token_id=DOCUMENT,
        pad_token_id=PADDING,
        tie_word_embeddings=False,
    )


def cache_folder(settings: Settings) -> Path:
    """Where pretrained bases are kept."""
    named = settings.cache_folder or os.environ.get("FL_MERGE_CACHE", "")
    return Path(named or Path.home() / ".cache" / "fl_merge").expanduser()


def recipe_hash(settings: Settings) -> str:
    """A hash of all that the small model depends on: its text, its size, its pretraining."""
    texts = hashlib.blake2b(digest_size=16)
    for document in corpus.public_documents(settings.seed):
        texts.update(f"{document.name} {len(document)} ".encode() + document.text)
    made_of = {
        "version": VERSION,
        "texts": texts.hexdigest(),
        "layers": settings.layers,
        "hidden": settings.hidden,
        "steps": settings.pretraining_steps,
        "pretraining": [SEQUENCE, BATCH, RATE],
        "seed": settings.seed,
        "torch": torch.__version__,
    }
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=8).hexdigest()


def _pretrained(settings: Settings) -> Path:
    """The folder of the small model. Of several processes that want it, one pretrains and the others wait."""
    cache = cache_folder(settings)
    found = cache / f"language-{settings.layers}x{settings.hidden}-{recipe_hash(settings)}"
    if (found / "config.json").exists():
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{found}.lock"):
        if not (found / "config.json").exists():
            logger.info(
                "pretraining the byte-level base (%s steps), to be kept in %s", settings.pretraining_steps, found
            )
            made = Path(tempfile.mkdtemp(dir=cache, prefix="unfinished-"))
            try:
                model = pretrain(settings)
                model.save_pretrained(made)
                save_byte_tokenizer(made)
                os.replace(made, found)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    return found


def pretrain(settings: Settings) -> Any:
    """The small model, pretrained on the public documents in one thread: the number of threads changes no bit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _transformers().AutoModelForCausalLM.from_config(small_config(settings))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        finetune(
            model,
            Bytes()(corpus.public_documents(settings.seed)),
            steps=settings.pretraining_steps,
            batch_size=BATCH,
            length=SEQUENCE,
            learning_rate=RATE,
            key=("pretraining", settings.seed),
            decay=True,
        )
    finally:
        torch.set_num_threads(threads)
    return model
