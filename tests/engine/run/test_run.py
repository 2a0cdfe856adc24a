"""The main job as a user starts it: torchrun, two ranks, the recipe; then what it left is looked at from outside."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
import toys
from jobs import TWO_RANKS, finish, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slicetune
from slicetune.engine import commands
from slicetune.engine.common import checkpoint
from slicetune.engine.data import tiny
from slicetune.engine.data.batching import pack
from slicetune.engine.export.audit import audit
from slicetune.engine.slices.ffn import attach
from slicetune.engine.slices.neurons import NeuronSet
from slicetune.engine.slices.patches import load_masters


@pytest.fixture(scope="module")
def base() -> Path:
    return tiny.model_dir("test")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "out"
    return out, finish(start(TWO_RANKS, base, out))


def test_every_artefact_is_there(finished):
    out, output = finished
    names = {p.name for p in out.iterdir()}
    wanted = {"config.json", "metrics.jsonl", "statistics.safetensors", "neurons.safetensors", "checkpoints", "model"}
    assert wanted | {"translations", "results.json", "report.html"} <= names
    assert "seen, mean" in output
    results = json.loads((out / "results.json").read_text())
    assert results["trainable_parameters"] == NeuronSet.load(out / "neurons.safetensors").parameters()
    assert set(results["systems"]) == {"base", "caneft"}
    assert set(results["seconds"]) >= {"score", "select", "train", "export", "translate"}
    for system in ("base", "caneft"):
        for domain in ("it", "law", "medical", "subtitles", "koran"):
            assert len((out / "translations" / system / f"{domain}.en").read_text().splitlines()) == 4


def test_every_file_may_be_read_as_any_new_file(finished, tmp_path):
    """safetensors' writer would let nobody else read its files."""
    (plain := tmp_path / "plain").write_text("")
    files = [file for file in finished[0].rglob("*") if file.is_file()]
    assert {file.stat().st_mode for file in files if file.suffix == ".safetensors"}
    assert not [file for file in files if file.stat().st_mode != plain.stat().st_mode]


def test_the_version_stands_in_what_a_run_leaves(finished):
    out, _ = finished
    assert json.loads((out / "results.json").read_text())["slicetune"] == slicetune.__version__
    assert NeuronSet.load(out / "neurons.safetensors").provenance["slicetune"] == slicetune.__version__
    with safe_open(out / "statistics.safetensors", framework="pt") as file:
        assert file.metadata()["slicetune"] == slicetune.__version__


def test_nothing_outside_the_set_changed(finished, base):
    report = audit(base, finished[0])
    assert report.ok
    assert sum(report.changed.values()) > 0
    assert sum(report.allowed.values()) == NeuronSet.load(finished[0] / "neurons.safetensors").parameters()


def test_the_audit_command_finds_a_flipped_bit(finished, base, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "out", ignore=shutil.ignore_patterns("checkpoints"))
    weights = load_file(out / "model" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, out / "model" / "model.safetensors", {"format": "pt"})
    assert commands.main(["audit", str(base), str(finished[0])]) == 0
    assert commands.main(["audit", str(base), str(out)]) == 1
    assert "model.norm.weight" in capsys.readouterr().out


def test_exported_model_gives_the_live_models_logits(finished, base):
    """The live model: base with slices attached and the checkpoint's masters in them, as training ended."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = finished
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    attach(live, NeuronSet.load(out / "neurons.safetensors"))
    chosen = json.loads((out / "chosen.json").read_text())["checkpoint"]
    load_masters(live, checkpoint.load(out / chosen)[0])
    exported = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(out / "model")("German: Die Anlage wird geprüft.").input_ids])
    stored = next(iter(load_file(next((out / "model").glob("*.safetensors"))).values())).dtype
    with torch.no_grad():
        live(ids)  # writes the slices into the weights
        assert any(not torch.equal(p, m) for _, _, p, m in _masters(live, base))
        assert torch.equal(live.to(stored)(ids).logits, exported.to(stored)(ids).logits)


def _masters(live, base):
    weights = load_file(base / "model.safetensors")
    for name, axis, parameter, index in toys.named_slices(live):
        yield name, axis, parameter, weights[name][index].float()


def test_a_finished_run_is_not_run_again(finished, base):
    output = finish(start(TWO_RANKS, base, finished[0]))
    for stage in ("score", "select", "train", "export", "translate"):
        assert f"[{stage}] done before" in output


def test_a_changed_setting_is_refused_with_its_difference(finished, base):
    process = start(["--standalone", "--nproc_per_node", "1"], base, finished[0], **{"score.tokens": "target"})
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "score.tokens: all → target" in output
    assert "Traceback (most recent call last):\n  File" not in output.split("error:")[0]


def test_two_agents_finish_a_run_together(base, finished, tmp_path):
    """`--nnodes 2`: two torchrun agents, as on two machines, one rank each, with the model in parts.

    Statistics, weights and translations are those of two whole replicas, bit for bit.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    parts = {"model.partition": "on"}
    agents = [start([*address, "--node_rank", str(r)], base, tmp_path / "out", **parts) for r in (0, 1)]
    outputs = [finish(agent) for agent in agents]
    assert "seen, mean" in outputs[0]
    assert "seen, mean" not in outputs[1]
    assert audit(base, tmp_path / "out").ok
    texts = [str(f.relative_to(finished[0])) for f in sorted((finished[0] / "translations").glob("*/*.en"))]
    assert len(texts) == 15  # two systems and the references
    for name in ("statistics.safetensors", "model/model.safetensors", "delta/delta.safetensors", *texts):
        assert (tmp_path / "out" / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_packed_sentences_of_the_recipe_do_not_interact(base):
    """The recipe's own data and model: every packed loss equals the sentence's alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slicetune.engine.data import corpus
    from slicetune.engine.data.config import DataConfig
    from slicetune.engine.data.examples import encode_pairs
    from slicetune.engine.scoring.loss import target_losses

    data = DataConfig(prompt="short")
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = corpus.load_domain(data, "law", "dev", 6)
    made, dropped = encode_pairs(tokenizer, data, pairs, data.seen, "dev", 512)
    assert not dropped
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    packed = target_losses(model, pack(made))
    single = torch.cat([target_losses(model, pack([e])) for e in made])
    assert torch.allclose(packed, single, rtol=1e-5, atol=1e-5)
