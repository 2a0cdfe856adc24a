"""Each layer's counts lie on one rank: the same statistics, the same file, and saves that go on on any ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import scoring_jobs as jobs
import torch
import toys

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError
from slicetune.engine.data.batching import batches_by_tokens
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.models.shapes import from_config, known
from slicetune.engine.scoring.passes import Turns, counts_bytes, score, walk
from slicetune.engine.scoring.progress import FILE, Progress, prune, turns
from slicetune.engine.scoring.share import Share, owned
from slicetune.engine.scoring.statistics import Statistics

SHAPE = SimpleNamespace(layers=5, widths={"gate": 7, "down": 4}, fan_in={"gate": 4, "down": 7}, intermediate=7)
LLAMA = known("Llama-3.1-8B")
EXACT = ("samples", "tokens", "active", "clamped_low", "clamped_high")


@pytest.fixture(scope="module")
def alone() -> Statistics:
    """The whole statistics of one process."""
    model = jobs.three_layers()
    stats = Statistics(jobs.GROUPS, from_config(model.config))
    score(model, toys.examples(jobs.SENTENCES), stats, jobs.CONFIG)
    return stats


def same(found: Statistics, whole: Statistics) -> None:
    """Equal counts; float64 sums to their last digits, since ranks sum in another order."""
    assert all(torch.equal(found.histogram[p], whole.histogram[p]) for p in whole.widths)
    for name, tensor in whole._small().items():
        if name in EXACT:
            assert torch.equal(found._small()[name], tensor), name
        else:
            torch.testing.assert_close(found._small()[name], tensor, rtol=1e-14, atol=1e-14)


def test_layers_are_dealt_and_none_is_left():
    assert [list(owned(5, rank, 2)) for rank in range(2)] == [[0, 2, 4], [1, 3]]
    assert sorted(layer for rank in range(8) for layer in owned(5, rank, 8)) == list(range(5))
    assert counts_bytes(4, LLAMA) == 4 * 256 * 4 * 32 * (14336 + 14336 + 4096)
    assert counts_bytes(4, LLAMA, 3) == counts_bytes(4, LLAMA) * 11 // 32  # the first rank has eleven layers
    assert counts_bytes(4, LLAMA, 64) == counts_bytes(4, LLAMA) // 32


def test_two_ranks_have_the_counts_of_their_layers_and_write_one_file(pool, alone, tmp_path):
    assert len(list(batches_by_tokens(toys.examples(jobs.SENTENCES), 60, packed=False))) % 2 == 1
    ranks = pool.run("share_toys", str(tmp_path))
    assert [here for here, _ in ranks] == [[0, 2], [1]]
    for here, held in ranks:
        for projection, counts in alone.histogram.items():
            assert torch.equal(held[f"histogram.{projection}"], counts[:, here])
    assert all(torch.equal(ranks[0][1][name], ranks[1][1][name]) for name in alone._small())
    written = Statistics.load(tmp_path / "statistics.safetensors")
    same(written, alone)
    assert written.provenance == {"toy": 1}
    written.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "statistics.safetensors").read_bytes()


def test_one_rank_has_everything_and_its_file_is_that_of_the_whole(alone, tmp_path):
    model = jobs.three_layers()
    share = jobs.empty(model)
    jobs.score_share(model, share)
    for each, name in ((share, "share"), (alone, "whole")):
        each.save(tmp_path / name, {"toy": 1})
    assert (tmp_path / "share").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_rank_that_cannot_write_leaves_nobody_waiting(pool, tmp_path):
    first, second = pool.run("save_on_a_full_disk", str(tmp_path), timeout=60)
    assert "No space left" in first
    assert second == ""
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_partitioned_model_run_it_equally_often_and_count_the_same(pool, tmp_path):
    jobs.three_layers().save_pretrained(tmp_path)
    plain, together = (pool.run("run_together", folder) for folder in ("", str(tmp_path)))
    for kind in (0, 1):  # scoring, detection
        assert plain[0][0][kind] > plain[1][0][kind]
        assert plain[0][0][kind] == together[0][0][kind] == together[1][0][kind]
    for rank in (0, 1):
        assert all(torch.equal(together[rank][1][name], tensor) for name, tensor in plain[rank][1].items())


def test_a_walk_deals_what_is_left():
    """Ten batches, four of them done by others: three ranks share the rest, and all speak equally often."""
    batches = [[i] * (i + 1) for i in range(10)]
    taken, said, turns_seen = [], [], []
    for rank in range(3):
        ranks = Turns(rank, 3, together=False, progress=lambda samples: said.append(samples))
        walk(
            batches,
            lambda batch, recorded: taken.append(batch[0]),
            ranks,
            done=5,
            after_batch=turns_seen.append,
            exchange=lambda turn: said.append(-len(turn)),
        )
    assert sorted(taken) == [5, 6, 7, 8, 9]
    assert turns_seen == [8, 10] * 3
    assert said == [15, -3, 21, -2, 19] * 3


# ---------------------------------------------------------------- saves


def drawn(rank: int, world: int) -> Share:
    share, draw = Share(["it", "law"], SHAPE, -40, "cpu", rank, world), torch.Generator().manual_seed(world * 10 + rank)
    for tensor in jobs.held(share).values():
        tensor += torch.randint(0, 90_000, tensor.shape, generator=draw)
    return share


@pytest.mark.parametrize(("before", "now"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 3), (4, 3), (3, 8), (8, 2)])
def test_parts_go_to_any_number_of_ranks(before, now, tmp_path):
    """Every layer's counts to its new owner, every rank's sums to one new rank; the old ranks' own to themselves."""
    old = [drawn(rank, before) for rank in range(before)]
    parts = [tmp_path / f"{rank}.safetensors" for rank in range(before)]
    for share, path in zip(old, parts, strict=True):
        share.save_part(path)
    new = [Share(["it", "law"], SHAPE, -40, "cpu", rank, now) for rank in range(now)]
    for share in new:
        share.take(parts)
        for projection in SHAPE.widths:
            for layer in share.here:
                wanted = old[layer % before]._counts(layer, projection)
                assert torch.equal(share._counts(layer, projection), wanted)
    for name in old[0]._small():
        assert torch.equal(sum(s._small()[name] for s in new), sum(s._small()[name] for s in old)), name
        if before == now:
            assert all(torch.equal(a._small()[name], b._small()[name]) for a, b in zip(old, new, strict=True))


def test_a_part_of_another_shape_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / "part.safetensors"
    drawn(0, 2).save_part(path)
    with pytest.raises(UserError, match=r"part\.safetensors: its format is|not readable as statistics"):
        Statistics.load(path)
    with pytest.raises(UserError, match=r"part\.safetensors: not readable as a part of statistics .*is \[2, 3, 7"):
        Share(["it", "law"], SHAPE, -40, "cpu", 0, 3).take([path] * 3)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part\.safetensors: not readable as a part"):
        drawn(0, 2).take([path, path])


def test_sums_of_detection_go_to_any_number_of_ranks(tmp_path, monkeypatch):
    parts = [tmp_path / f"{rank}" for rank in range(3)]
    for rank, path in enumerate(parts):
        found = Detection(("de-en",), 2, 6, 4)
        found.awareness_sum += 10.0**rank
        found.prompts += 2**rank
        found.save_part(path)
    for world, wanted in ((2, [5, 2]), (3, [1, 2, 4]), (4, [1, 2, 4, 0]), (1, [7])):
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            fresh = Detection(("de-en",), 2, 6, 4)
            fresh.take(parts)
            assert fresh.prompts.tolist() == [wanted[rank]]


def save(root: Path, step: int, ranks, dealt: list, identity: int = 1) -> None:
    """What so many ranks leave of a turn."""
    for rank in ranks:
        state = {"step": step, "rank": rank, "dealt": dealt, "identity": {"toy": identity}}
        checkpoint.write(root / f"rank-{rank}" / f"step-{step}", state, 1, lambda p: (p / FILE).write_text("x"))


def test_only_a_turn_that_every_rank_saved_is_taken(tmp_path):
    save(tmp_path, 4, range(2), [[0, 2]])
    save(tmp_path, 6, range(2), [[0, 2]])
    save(tmp_path, 8, [0], [[0, 2]])  # killed between the two ranks' saves
    found, notes = turns(tmp_path, {"toy": 1})
    assert [turn.step for turn in found] == [6, 4]
    assert found[0].parts == [tmp_path / f"rank-{rank}" / "step-6" for rank in range(2)]
    assert len(notes) == 1
    assert "step-8: 1 of 2 ranks' parts are there, the save was cut short" in notes[0]


def test_parts_of_differently_dealt_lists_are_not_put_together(tmp_path):
    """Two ranks, then three, then two again come to the same batch by another way: a part of each is no turn."""
    save(tmp_path, 8, [0, 1], [[0, 2]])
    save(tmp_path, 8, [1], [[0, 2], [2, 3], [5, 2]])
    found, notes = turns(tmp_path, {"toy": 1})
    assert found == []
    assert len(notes) == 2


def test_other_settings_and_unreadable_states_are_named(tmp_path):
    assert turns(tmp_path / "nothing", {"toy": 1}) == ([], [])
    save(tmp_path, 4, range(2), [[0, 2]], identity=2)
    assert turns(tmp_path, {"toy": 1}) == ([], [f"{tmp_path} is of other settings: from the start"])
    save(tmp_path, 2, range(1), [[0, 1]])
    (tmp_path / "rank-3" / "step-9.partial").mkdir(parents=True)
    for number, dealt in enumerate(([], "x", [[0]], [[0, 0]], None, 3, [[0, "a"]])):
        save(tmp_path, 10 + number, [0], dealt)
    (tmp_path / "rank-0" / "step-10" / "state.json").write_text("[]")
    found, notes = turns(tmp_path, {"toy": 1})
    assert [turn.step for turn in found] == [2]
    assert len(notes) == 8
    assert all(note.startswith("passed over ") for note in notes)
    prune(tmp_path, 2, 1)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")] == ["rank-0/step-2"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_one_rank_could_not_finish_leaves_the_turn_before(pool, alone, tmp_path, world, capsys):
    """Rank 1's third save fails: both ranks stop, and two ranks or one go on from the second."""
    whole = pool.run("scored_until", str(tmp_path / "whole"), 0)
    broken = pool.run("scored_until", str(tmp_path / "out"), 2)
    assert [message for message, _ in broken] == ["the disk of rank 1 is full"] * 2
    kept = sorted(str(p.relative_to(tmp_path / "out" / "scoring")) for p in (tmp_path / "out" / "scoring").glob("*/*"))
    assert kept == ["rank-0/step-4", "rank-0/step-6", "rank-1/step-4"]
    if world == 2:
        again = pool.run("scored_until", str(tmp_path / "out"), 0)
        for (said, held), (_, wanted) in zip(again, whole, strict=True):
            assert said == "resumed at 4"
            assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())
        return
    model = jobs.three_layers()
    share, progress = jobs.empty(model), Progress(tmp_path / "out", {"toy": 1}, minutes=0.0)
    assert progress.resume(share) == 4
    jobs.score_share(model, share, progress, 4)
    same(share, alone)
    assert "goes on after 4 batches, the rest dealt out to 1 ranks instead of 2" in capsys.readouterr().out
    assert [p.parent.name for p in (tmp_path / "out" / "scoring").glob("*/*")] == ["rank-0"]


def test_one_rank_goes_on_as_two_and_damaged_parts_are_named(pool, alone, tmp_path, capsys):
    model = jobs.three_layers()
    share, progress = jobs.empty(model), Progress(tmp_path, {"toy": 1}, minutes=0.0)
    after = progress.after_batch

    class Stop(Exception):
        pass

    def stopping(statistics: Share, done: int) -> None:
        after(statistics, done)
        if done == 3:
            raise Stop

    progress.after_batch = stopping
    with pytest.raises(Stop):
        jobs.score_share(model, share, progress)
    for said, _ in (again := pool.run("scored_until", str(tmp_path), 0)):
        assert said == "resumed at 3"
    for rank, (_, held) in enumerate(again):
        for projection, counts in alone.histogram.items():
            assert torch.equal(held[f"histogram.{projection}"], counts[:, owned(3, rank, 2)])
        for name, tensor in alone._small().items():
            torch.testing.assert_close(held[name], tensor, rtol=1e-14, atol=1e-14)
    part = next((tmp_path / "scoring" / "rank-1").glob("step-*")) / FILE
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    assert Progress(tmp_path, {"toy": 1}, minutes=0.0).resume(jobs.empty(model)) == 0
    assert f"passed over {part}: its content changed" in capsys.readouterr().out
