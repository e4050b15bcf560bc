"""Tokens, bits per byte, the pretrained base and its checkpoint, adapters."""

import math
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_clients import base, corpus, lora, tokens
from language_clients.corpus import Document
from language_clients.settings import Settings
from language_clients.training import bits_per_byte, finetune

TEXT = Document("text", "Zwölf Boxkämpfer \x00\xff jagen <|document|>".encode("latin-1") + bytes(range(256)))


def tiny(folder, **changes):
    return Settings(layers=2, hidden=32, pretraining_steps=3, cache_folder=str(folder), **changes)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("cache"))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_bytes_are_their_own_tokens():
    found = tokens.Bytes()([TEXT, Document("next", b"ab")])
    assert found.ids_T.tolist() == [256, *TEXT.text, 256, 97, 98]
    assert found.bytes_T.sum() == len(TEXT) + 2
    assert found.bytes_T[0] == 0


def test_the_saved_tokenizer_gives_the_same_tokens(settings):
    theirs = AutoTokenizer.from_pretrained(base.folder(settings))
    text = "def f(x):\n\treturn 'Zwölf' # 数\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert (theirs.bos_token_id, theirs.pad_token_id) == (tokens.DOCUMENT, tokens.PADDING)


def test_a_hugging_face_tokenizer_charges_every_byte_once(settings):
    reads = tokens.HuggingFace(AutoTokenizer.from_pretrained(base.folder(settings)))
    text = "naïve — words, more words".encode()
    found = reads([Document("a", text), Document("b", b"xyz")])
    assert found.bytes_T.sum() == len(text) + 3
    assert found.ids_T[0] == tokens.DOCUMENT
    spans = [(0, 5), (6, 7), (7, 13)]
    assert list(tokens._bytes_of("naïve — words", spans)) == [6, 4, 6]


def test_batches_are_cut_out_of_the_text_by_the_key_alone():
    row = tokens.Tokens(torch.arange(1000), torch.ones(1000))
    first = list(tokens.batches(row, batch_size=4, length=16, steps=3, key=1))
    assert len(first) == 3
    assert all(batch.shape == (4, 17) and (batch.diff(dim=1) == 1).all() for batch in first)
    again = tokens.batches(row, batch_size=4, length=16, steps=3, key=1)
    other = tokens.batches(row, batch_size=4, length=16, steps=3, key=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_evaluation_covers_the_text_once():
    row = tokens.Tokens(torch.arange(100), torch.ones(100))
    cut = list(tokens.windows(row, length=16, limit=1e9))
    assert torch.equal(torch.cat([ids[1:] for ids, _ in cut]), torch.arange(1, 100))
    few = [ids[0].item() for ids, _ in tokens.windows(row, length=16, limit=32)]
    assert few == [0, 48]


# Bits per byte --------------------------------------------------------------------------------------------------------


def knows_nothing(input_ids, use_cache):
    return types.SimpleNamespace(logits=torch.zeros(*input_ids.shape, tokens.VOCABULARY))


def test_a_uniform_model_needs_eight_bits_a_byte():
    text = tokens.Bytes()([TEXT, TEXT])
    bits, measured = bits_per_byte(knows_nothing, text, length=64, limit=1e9, num_bytes=256)
    assert bits == pytest.approx(8.0, abs=1e-6)
    assert measured == 2 * len(TEXT)
    assert bits_per_byte(knows_nothing, text, length=64, limit=1e9)[0] == pytest.approx(math.log2(258), abs=1e-6)


def test_bits_per_byte_by_hand():
    """Two bytes as one token of probability 1/8, then one byte of probability 1/2: 4 bits for 3 bytes."""

    def model(input_ids, use_cache):
        chances = torch.tensor([[[1 / 8, 7 / 8], [1 / 2, 1 / 2]]])
        return types.SimpleNamespace(logits=chances.log())

    row = tokens.Tokens(torch.tensor([0, 0, 1]), torch.tensor([0.0, 2.0, 1.0]))
    assert bits_per_byte(model, row, length=2, limit=10)[0] == pytest.approx(4 / 3)


# The base -------------------------------------------------------------------------------------------------------------


def test_the_base_is_a_function_of_its_settings(settings, tmp_path):
    first = base.load(settings).state_dict()
    assert equal(first, base.load(tiny(tmp_path)).state_dict())
    assert not equal(first, base.load(tiny(tmp_path, seed=1)).state_dict())
    assert len(list(tmp_path.glob("language-*/config.json"))) == 2
    assert not list(tmp_path.glob("unfinished-*"))


def test_the_base_is_pretrained_once(settings, monkeypatch):
    base.folder(settings)
    monkeypatch.setattr(base, "pretrain", lambda settings: pytest.fail("pretrained again"))
    base.folder(settings)


def test_pretraining_teaches_something(settings):
    reads = tokens.Bytes()(corpus.validation_documents()["python"])
    model = base.load(settings)
    before, _ = bits_per_byte(model, reads, length=64, limit=2000, num_bytes=256)
    text = tokens.Bytes()(corpus.public_documents())
    finetune(model, text, steps=20, batch_size=4, length=64, learning_rate=1e-2, key=0)
    after, _ = bits_per_byte(model, reads, length=64, limit=2000, num_bytes=256)
    assert after < before - 0.5
    assert after < 7


def test_training_leaves_the_global_generator_alone(settings):
    model, state = base.load(settings), torch.get_rng_state()
    finetune(model, tokens.Bytes()([TEXT]), steps=1, batch_size=2, length=8, learning_rate=1e-3, key=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_checkpoint_loads_and_generates(settings):
    model = AutoModelForCausalLM.from_pretrained(base.folder(settings))
    asked = torch.tensor([list(b"import ")])
    answer = model.generate(asked, max_new_tokens=5, do_sample=False)
    assert answer.shape == (1, 12)


def test_a_model_that_is_nowhere_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"^model: 'no/such-model' is no folder .* run `hf download no/such-model"):
        base.load(Settings(model="no/such-model"))
    with pytest.raises(ValueError, match="holds no causal language model that transformers can load"):
        base.load(Settings(model=str(tmp_path)))


# Adapters -------------------------------------------------------------------------------------------------------------


def wrapped(settings, rank, seed=0, targets=("q_proj", "v_proj")):
    return lora.wrap(base.load(settings), rank=rank, alpha=8.0, targets=targets, seed=seed)


def test_an_adapter_has_pefts_names_and_changes_nothing_at_first(settings):
    model = wrapped(settings, 4)
    adapter = lora.take(model)
    assert len(adapter) == 2 * 2 * 2
    assert adapter["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"].shape == (4, 32)
    assert equal(adapter, lora.take(wrapped(settings, 4)))
    assert not equal(adapter, lora.take(wrapped(settings, 4, seed=1)))
    asked = torch.tensor([list(b"import torch")])
    with torch.no_grad():
        assert torch.equal(model(asked).logits, base.load(settings)(asked).logits)
    assert lora.rank_of(adapter) == 4


def product(adapter, module="base_model.model.model.layers.0.self_attn.q_proj"):
    return adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]


def test_another_rank_is_cut_off_or_filled_up(settings):
    draw = torch.Generator().manual_seed(3)
    sent = {name: torch.randn(tensor.shape, generator=draw) for name, tensor in lora.take(wrapped(settings, 4)).items()}
    larger, smaller = wrapped(settings, 6), wrapped(settings, 2)
    lora.put(larger, sent)
    torch.testing.assert_close(product(lora.take(larger)), product(sent))
    lora.put(smaller, sent)
    cut = {name: tensor[:2] if name.endswith(lora.A) else tensor[:, :2] for name, tensor in sent.items()}
    assert equal(lora.take(smaller), cut)
    with pytest.raises(ValueError, match="do server and clients name the same adapter-targets"):
        lora.put(wrapped(settings, 4, targets=("q_proj",)), sent)


def test_targets_that_are_no_modules_are_refused(settings):
    with pytest.raises(ValueError, match=r"^adapter-targets: no_such_proj: "):
        wrapped(settings, 4, targets=("no_such_proj",))
