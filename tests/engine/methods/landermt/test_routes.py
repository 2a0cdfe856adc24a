"""Routes: gains unit by unit from their definition, participants, files that come back exactly, bad ones refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.languages import languages_of
from slicetune.engine.methods.landermt.routes import GENERAL, NOBODY, Routes

PAIRS = ("de-en", "en-de", "fr-en")
OWNER = [[GENERAL, 0, 1, 2, NOBODY, 1, GENERAL], [2, 2, GENERAL, 0, GENERAL, NOBODY, 1]]  # de 0, en 1, fr 2
SHARE = torch.tensor([[0.75, 0.5], [0.7, 0.25], [0.9, 0.125]])
TAKES = torch.tensor([[True, True], [True, False], [False, True]])


def make(**changes) -> Routes:
    about = {"pairs": PAIRS, "languages": ("de", "en", "fr"), "layers": (1, 4), "takes": TAKES, "share": SHARE}
    about |= {"owner": torch.tensor(OWNER, dtype=torch.int16), "car": "general_share", "site": "input"}
    return Routes(**(about | {"total_layers": 6, "intermediate": 7, "provenance": {"k": 2}} | changes))


def gain_of_one(pair: int, position: int, unit: int, car: str) -> float:
    """The definition, for one unit."""
    if not TAKES[pair, position]:
        return 1.0
    owner, share = OWNER[position][unit], SHARE[pair, position].item()
    mine = owner == GENERAL or (owner >= 0 and ("de", "en", "fr")[owner] in PAIRS[pair].split("-"))
    if not mine:
        return 0.0
    return 1.0 if car == "none" else share if owner == GENERAL else 1 - share


@pytest.mark.parametrize("car", ["general_share", "none"])
def test_gains_unit_by_unit(car):
    routes = make(car=car)
    for position in range(2):
        wanted = [[gain_of_one(pair, position, unit, car) for unit in range(7)] for pair in range(3)]
        gain = routes.gains(position)
        assert gain.dtype == torch.float32
        assert torch.equal(gain, torch.tensor(wanted))
        assert torch.equal(routes.part(position), gain != 0)


def test_a_learned_share_gets_the_sum_over_units():
    """d gain/d share is 1 on general units, -1 on the pair's specific ones, 0 on the rest and on pairs not routed."""
    share = torch.tensor([0.3, 0.4, 0.5], requires_grad=True)
    gain = make(car="learned").gains(1, share)
    weight = torch.arange(21.0).view(3, 7)
    (gain * weight).sum().backward()
    assert torch.equal(gain[1], torch.ones(7))
    assert gain[0].tolist() == pytest.approx([0, 0, 0.3, 0.7, 0.3, 0, 0.7])
    assert share.grad.tolist() == [2 + 4 - 3 - 6, 0, 16 + 18 - 14 - 15 - 20]


def test_participants():
    routes = make()
    assert routes.participants(0, GENERAL) == {"de-en", "en-de"}
    assert routes.participants(1, GENERAL) == {"de-en", "fr-en"}
    assert routes.participants(1, 0) == {"de-en"}
    assert routes.participants(1, 2) == {"fr-en"}
    assert routes.participants(0, 2) == frozenset()
    assert routes.participants(0, NOBODY) == frozenset()


def test_counts_rows_and_table():
    routes = make()
    assert routes.counts(0) == {"general": 2, "de": 1, "en": 2, "fr": 1, "nobody": 1}
    assert routes.row("fr-en") == 2
    with pytest.raises(UserError, match="'en-fr' has no route: there are de-en en-de fr-en"):
        routes.row("en-fr")
    text = routes.describe()
    assert "2 of 6 layers routed for 3 pairs, not all of every pair; car general_share at the input" in text
    assert text.splitlines()[-1].split() == ["fr-en", "–", "0.125"]
    assert "shared by all pairs" in make(takes=torch.ones(3, 2, dtype=torch.bool)).describe()


def test_file_comes_back_exactly(tmp_path):
    routes, path = make(), tmp_path / "a" / "routes.safetensors"
    routes.save(path)
    back = Routes.load(path)
    for field in dataclasses.fields(Routes):
        old, new = getattr(routes, field.name), getattr(back, field.name)
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new, field.name
    assert back.fingerprint == routes.fingerprint
    assert make(provenance={}).fingerprint == routes.fingerprint
    assert make(site="output").fingerprint != routes.fingerprint
    assert make(share=SHARE / 2).fingerprint != routes.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": ()}, "pairs none"),
        ({"pairs": ("de-en", "de-en", "fr-en")}, "each once"),
        ({"pairs": ("de-en", "deen", "fr-en")}, "'deen': write source-target"),
        ({"languages": ("de", "en", "it")}, "without fr"),
        ({"layers": (4, 1)}, "ascending"),
        ({"layers": (1, 6)}, "ascending"),
        ({"car": "mean"}, "car 'mean'"),
        ({"site": "middle"}, "at input or output"),
        ({"owner": torch.tensor(OWNER)}, "owner is torch.int64"),
        ({"owner": torch.tensor(OWNER, dtype=torch.int16) + 1}, "owner 3"),
        ({"owner": torch.tensor(OWNER, dtype=torch.int16) - 1}, "owner -3"),
        ({"share": SHARE[:2]}, "share is"),
        ({"share": SHARE + 0.2}, "between 0 and 1"),
        ({"share": SHARE * torch.nan}, "between 0 and 1"),
        ({"takes": TAKES & torch.tensor([True, False])}, "routed by no pair"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "routes.safetensors"
    with pytest.raises(UserError, match="no such file"):
        Routes.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match=r"routes\.safetensors: not routes"):
        Routes.load(path)
    save_file({"owner": torch.zeros(1)}, path, {"format": "slicetune.neurons"})
    with pytest.raises(UserError, match=r"not 'slicetune\.routes'"):
        Routes.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="not what was written"):
        Routes.load(path)


def test_languages_of():
    assert languages_of(("fr-en", "de-en", "en-de")) == ("de", "en", "fr")
    for pair in ("de", "de-", "de-en-fr", "en-en"):
        with pytest.raises(UserError, match="write source-target"):
            languages_of((pair,))
