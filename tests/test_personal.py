"""N personal models from one merged delta and a bit an element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl_merge import MergeError, RecipeError, UpdateError, merge
from fl_merge.methods import consensus
from fl_merge.methods import emr as emr_method
from fl_merge.personal import Personal, emr, pack, personal_masks, unpack

BASE = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "n": torch.tensor(7)}


def moved(*delta):
    return {"w": BASE["w"] + torch.tensor(delta), "n": torch.tensor(7)}


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(values):
    mask_S = torch.tensor(values, dtype=torch.bool)
    packed = pack(mask_S)
    assert packed.numel() == -(-len(values) // 8)
    assert torch.equal(unpack(packed, len(values)), mask_S)


def test_bits_that_do_not_fit_are_refused():
    with pytest.raises(MergeError, match=r"found 1 bytes of torch\.uint8, wanted 2 of uint8"):
        unpack(pack(torch.ones(8, dtype=torch.bool)), 9)


def test_clients_that_moved_different_elements_come_back_exactly():
    clients = {"b": moved(0.0, 0.5, 0.0, 0.0, 2.0), "10": moved(1.0, 0.0, 0.0, -3.0, 0.0), "9": moved(*[0.0] * 5)}
    for found in (personal_masks(BASE, clients), emr(BASE, clients)):
        assert list(found.masks) == ["9", "10", "b"]
        for client_id, client in clients.items():
            model = found.model(BASE, client_id)
            assert torch.equal(model["w"], client["w"])
            assert torch.equal(model["n"], BASE["n"])


def test_masks_by_hand():
    # sum: 3 -1 2 . .   |tau| > 0.4 |sum - tau|:  0: 2 > .4*1, 1 > .4*2, no   1: 1 > .4*2, 2 > .4*1   2: . , 2 > 0
    found = personal_masks(BASE, [moved(2.0, 1.0, 0.0, 0.0, 0.0), moved(1.0, -2.0, 2.0, 0.0, 0.0)])
    assert unpack(found.masks["0"]["w"], 5).tolist() == [True, True, False, False, False]
    assert unpack(found.masks["1"]["w"], 5).tolist() == [True, True, True, False, False]
    assert found.model(BASE, "0")["w"].tolist() == [4.0, 1.0, 3.0, 4.0, 5.0]
    assert found.consensus(BASE)["w"].tolist() == [4.0, 1.0, 3.0, 4.0, 5.0]
    assert found.consensus(BASE, 1)["w"].tolist() == [4.0, 1.0, 5.0, 4.0, 5.0]


def test_emr_by_hand():
    # sums: 3 -1 2 . .; unified: 2 -2 2 . .; masks: 1 0 0, 1 1 1; factors: (2 + 1) / 2, (1 + 2 + 2) / (2 + 2 + 2)
    found = emr(BASE, [moved(2.0, 1.0, 0.0, 0.0, 0.0), moved(1.0, -2.0, 2.0, 0.0, 0.0)])
    assert found.delta["w"].tolist() == [2.0, -2.0, 2.0, 0.0, 0.0]
    assert found.factors == {"0": 1.5, "1": 5 / 6}
    assert found.model(BASE, "0")["w"].tolist() == [4.0, 2.0, 3.0, 4.0, 5.0]
    assert found.model(BASE, "1")["w"].tolist() == pytest.approx([1 + 5 / 3, 2 - 5 / 3, 3 + 5 / 3, 4.0, 5.0])


def random_models():
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(30, 7, generator=generator), "b": torch.randn(11, generator=generator).bfloat16()}
    clients = [{n: (t + torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in base.items()} for _ in "123"]
    return base, clients


def test_consensus_is_the_merge_method_and_the_delta_of_emr_is_too():
    base, clients = random_models()
    wanted = merge(consensus(scale=0.6, threshold=0.5), base, clients)
    found = personal_masks(base, clients, scale=0.6, threshold=0.5).consensus(base)
    assert all(torch.equal(found[name], wanted[name]) for name in base)
    unified = merge(emr_method(), base, clients)
    delta = emr(base, clients).delta
    assert all(torch.equal((base[n].float() + delta[n]).to(base[n].dtype), unified[n]) for n in base)


def test_each_personal_model_has_its_clients_length():
    base, clients = random_models()
    found = emr(base, clients)
    for client_id, client in enumerate(clients):
        own = sum(float((client[name].double() - base[name].double()).abs().sum()) for name in base)
        part = sum(
            float(
                (found.delta[n].double() * unpack(found.masks[str(client_id)][n], t.numel()).reshape(t.shape))
                .abs()
                .sum()
            )
            for n, t in base.items()
        )
        assert found.factors[str(client_id)] * part == pytest.approx(own, rel=1e-6)


def test_saved_and_loaded_they_give_the_same_models(tmp_path):
    base, clients = random_models()
    named = {"x/y": clients[0], "11": clients[1], "2": clients[2]}
    found = emr(base, named)
    found.save(tmp_path / "personal")
    loaded = Personal.load(tmp_path / "personal")
    assert list(loaded.masks) == ["2", "11", "x/y"]
    assert loaded.factors == found.factors
    for client_id in named:
        one, other = found.model(base, client_id), loaded.model(base, client_id)
        assert all(torch.equal(one[name], other[name]) for name in base)
    size = sum(file.stat().st_size for file in (tmp_path / "personal").iterdir())
    elements = sum(tensor.numel() for tensor in base.values())
    assert size < 4 * elements + 3 * elements / 8 + 2000  # one delta, a bit an element and client, a header


def test_what_does_not_fit_is_refused(tmp_path):
    from fl_merge.store import save

    with pytest.raises(UpdateError, match="client '0', tensor 'w'"):
        personal_masks(BASE, [{"w": torch.zeros(4), "n": torch.tensor(7)}])
    with pytest.raises(RecipeError, match="parameter 'threshold': found -1"):
        personal_masks(BASE, [moved(*[1.0] * 5)], threshold=-1.0)
    with pytest.raises(MergeError, match="no client is given"):
        emr(BASE, [])
    found = emr(BASE, [moved(*[1.0] * 5)])
    with pytest.raises(MergeError, match=r"no mask of client '5' \(clients: 0\)"):
        found.model(BASE, "5")
    with pytest.raises(RecipeError, match="parameter 'at_least': found 2, wanted at most 1"):
        found.consensus(BASE)
    with pytest.raises(MergeError, match=r"base, tensor 'w': found shape \(3,\), wanted shape \(5,\)"):
        found.model({"w": torch.zeros(3)}, "0")
    save(
        {"delta/w": torch.zeros(9), "factor/0/a": torch.tensor(1.0), "mask/0/w": torch.zeros(1).byte()}, tmp_path / "a"
    )
    with pytest.raises(MergeError, match="client 'a', tensor 'w': wanted a bit an element"):
        Personal.load(tmp_path / "a")
    save({"w": torch.zeros(9)}, tmp_path / "b")
    with pytest.raises(MergeError, match="tensor 'w' is no part of personal models"):
        Personal.load(tmp_path / "b")


def test_tied_weights_count_once(tmp_path):
    """By hand, as above: the tensor under a second name changes no factor, and each name has its delta."""
    tied = {"w": BASE["w"], "v": torch.zeros(1), "again": BASE["w"]}
    clients = []
    for delta, own in (((2.0, 1.0, 0.0, 0.0, 0.0), 3.0), ((1.0, -2.0, 2.0, 0.0, 0.0), 1.0)):
        w = BASE["w"] + torch.tensor(delta)
        clients.append({"w": w, "v": torch.tensor([own]), "again": w})
    found = emr(tied, clients)
    # w as above, kept 2 and 6 of own 3 and 5; v is 3 for both, of 3 and 1: (3 + 3) / (2 + 3), (5 + 1) / (6 + 3)
    assert found.factors == {"0": 6 / 5, "1": 6 / 9}
    found.save(tmp_path / "personal")
    apart = {name: tensor.clone() for name, tensor in tied.items()}
    for personal in (found, Personal.load(tmp_path / "personal")):
        for base in (tied, apart):
            model = personal.model(base, "1")
            assert torch.equal(model["w"], model["again"])
            assert model["w"].tolist() == pytest.approx([1 + 4 / 3, 2 - 4 / 3, 3 + 4 / 3, 4.0, 5.0])
