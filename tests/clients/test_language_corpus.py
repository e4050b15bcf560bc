"""The text: disjoint parts, no copies across them, the same every time; and text of a client's own."""

import pytest

from language_clients import corpus
from language_clients.corpus import Document

ALL = (corpus.PUBLIC_DOMAIN, *corpus.DOMAINS)
PARTS = ("public", "train", "validation", "test")


def texts(documents):
    return {document.text for document in documents}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("domain", ALL)
def test_no_document_is_in_two_parts(domain, seed):
    parts = {part: getattr(corpus.split(domain, seed), part) for part in PARTS}
    names = [document.name for documents in parts.values() for document in documents]
    assert sorted(names) == sorted(document.name for document in corpus.documents(domain))
    assert len(set(names)) == len(names)
    everything = [document for documents in parts.values() for document in documents]
    assert len(texts(everything)) == len(everything)
    assert all(len(parts[part]) > 0 for part, fraction in corpus.PARTS[domain].items() if fraction > 0)
    assert not any(len(parts[part]) for part, fraction in corpus.PARTS[domain].items() if fraction == 0)


def test_the_split_depends_on_the_seed_alone():
    again = corpus.dealt(corpus.documents("python"), corpus.PARTS["python"], key="domain 'python', seed 0")
    assert again == corpus.split("python", 0)
    assert corpus.split("python", 0) != corpus.split("python", 1)


def test_nobody_trains_on_what_anybody_is_judged_by():
    trained, judged = set(texts(corpus.public_documents())), set()
    for partition in range(len(corpus.DOMAINS)):
        client = corpus.client(partition, len(corpus.DOMAINS))
        trained |= texts(client.train)
        judged |= texts(client.test) | texts(client.validation)
    judged |= {text for documents in corpus.validation_documents().values() for text in texts(documents)}
    assert not trained & judged


def test_clients_of_one_domain_share_it_without_overlap():
    four = len(corpus.DOMAINS)
    first, second = corpus.client(2, 2 * four), corpus.client(2 + four, 2 * four)
    assert (first.name, second.name) == ("tables-0", "tables-1")
    assert not texts(first.train) & texts(second.train)
    assert texts(first.train) | texts(second.train) == texts(corpus.client(2, four).train)
    assert first.test == second.test
    with pytest.raises(ValueError, match="leaves client 4000 without a document"):
        corpus.client(4000, 4001)
    with pytest.raises(ValueError, match=r"partition-id: 4, wanted one in \[0, 4\)"):
        corpus.client(4, 4)


def test_a_limit_cuts_the_text_off():
    documents = (Document("a", b"12345"), Document("b", b"6789"), Document("c", b"0"))
    assert corpus.limited(documents, 7) == (Document("a", b"12345"), Document("b", b"67"))
    assert corpus.limited(documents, 5) == documents[:1]
    assert corpus.limited(documents, 0) == documents
    assert sum(map(len, corpus.client(0, 4, train_bytes=1000).train)) == 1000


def lines(*numbers):
    return "\n".join(f"this is line number {number} of the text" for number in numbers).encode()


def test_near_copies_are_left_out():
    one = Document("one", lines(*range(20)))
    same = Document("the same in capitals", lines(*range(20)).upper() + b"\n\n(c) 2020 the holder of the rights")
    half = Document("half of it", lines(*range(10), *range(100, 110)))
    within = Document("a part of it", lines(3, 4, 5))
    holds_it = Document("holds it", lines(*range(200, 300), *range(20)))
    other = Document("other", lines(*range(8), *range(300, 320)))
    assert corpus.without_near_copies([one, same, half, within, holds_it, other]) == [one, other]


def test_a_folder_of_ones_own(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_bytes(lines(*range(100 * number, 100 * number + 20)))
    (tmp_path / "copy.txt").write_bytes(lines(*range(20)))
    client = corpus.client_of_folder(tmp_path)
    assert [len(client.train), len(client.validation), len(client.test)] == [8, 1, 1]
    assert len(texts(client.train) | texts(client.validation) | texts(client.test)) == 10
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 documents of at least 200 bytes, wanted 3"):
        corpus.client_of_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder on this machine"):
        corpus.client_of_folder(tmp_path / "nowhere")
