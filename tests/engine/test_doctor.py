"""The doctor: all is well here; a wrong kernel, an old library, a full disk and a crash are each found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from slicetune.engine import doctor


def test_all_is_well_here(capsys, tmp_path):
    assert doctor.main(["--out", str(tmp_path / "not" / "yet")]) == 0
    said = capsys.readouterr().out
    assert "all is well" in said
    assert "BAD" not in said
    assert all(name in said for name in (*doctor.NEEDED, *doctor.CHECKS, "NCCL", "gloo", "bf16", "flash-attn"))
    assert "attention over packed rows: sdpa" in said
    assert "loss: chunks" in said
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("name", ["tap", "gated_forward", "row_gradient", "column_gradient"])
def test_a_kernel_that_is_slightly_wrong_is_found(monkeypatch, name):
    right = getattr(doctor, name)
    monkeypatch.setattr(doctor, name, lambda *args, **kwargs: right(*args, **kwargs) * (1 + 1e-4))
    assert sum(not fine for fine, _ in doctor.kernels()) == 1


def test_a_miscounting_histogram_is_found(monkeypatch):
    right = doctor.accumulate
    monkeypatch.setattr(doctor, "accumulate", lambda s, g, counts, low: right(s, g, counts, low - 1))
    (line,) = [line for fine, line in doctor.kernels() if not fine]
    assert line.startswith("histogram: off by")


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch, capsys, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("PTX assembly\naborted")

    monkeypatch.setattr(doctor, "tap", broken)
    assert doctor.main(["--out", str(tmp_path)]) == 1
    assert "BAD tap: RuntimeError: PTX assembly aborted" in capsys.readouterr().out


def test_old_and_missing_libraries_are_found(monkeypatch):
    there = {"torch": "2.9.1+cu128", "transformers": "5.20"}
    monkeypatch.setattr(doctor, "version", lambda name: there.get(name, ""))
    bad = [line for fine, line in doctor.libraries() if not fine]
    assert bad[0] == "torch 2.9.1+cu128: install torch>=2.11"
    assert "sacrebleu missing: install sacrebleu>=2.5" in bad


def test_kernels_slices_and_optimizer_alone_are_a_sound_installation(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: {"torch": "2.12", "safetensors": "0.7"}.get(name, ""))
    assert all(fine for fine, _ in doctor.libraries())
    assert doctor.libraries()[0][1].endswith("for the engine: pip install 'slicetune[engine]'")


def test_little_room_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert not any(fine for fine, _ in doctor.room(Path(tmp_path)))
