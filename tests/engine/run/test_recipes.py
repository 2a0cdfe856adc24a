"""Recipes name what they differ in, each has a dry run without weights or network; errors are one line and code 2."""

import ast
import dataclasses
import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import toys

from slicetune.engine.common.errors import UserError
from slicetune.engine.methods.caneft.settings import Caneft
from slicetune.engine.methods.lape import Lape
from slicetune.engine.methods.lora import Lora
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.models.shapes import resolve
from slicetune.engine.run import cli
from slicetune.engine.run.config import RunConfig
from slicetune.engine.training.config import TrainConfig

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")


def load(path: Path) -> RunConfig:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CONFIG


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No sockets, no hub cache, an empty working directory."""

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_values(path):
    """A sentence and the command, imports of ours alone, one CONFIG by its model's file, a folder of its own name."""
    tree = ast.parse(path.read_text())
    sentence, blank, command = ast.get_docstring(tree).splitlines()
    assert sentence.endswith(".")
    assert not blank
    assert command.startswith("torchrun --nproc_per_node ")
    assert f" recipes/{path.name}" in command
    *imports, config, main = tree.body[1:]
    assert all(isinstance(node, ast.ImportFrom) and node.module.startswith("slicetune.") for node in imports)
    models = [node.module.rsplit(".", 1)[1] for node in imports if node.module.startswith("slicetune.recipes.models.")]
    assert len(models) == 1
    assert path.stem.endswith(f"_{models[0]}")
    assert isinstance(config, ast.Assign)
    assert ast.unparse(config.targets) == "CONFIG"
    assert ast.unparse(main) == "if __name__ == '__main__':\n    main(CONFIG)"
    forbidden = ast.FunctionDef | ast.For | ast.comprehension | ast.IfExp | ast.Lambda | ast.Starred
    assert not [node for node in ast.walk(tree) if isinstance(node, forbidden)]
    assert len(path.read_text().splitlines()) <= 14
    assert load(path).out == f"runs/{path.stem.replace('_', '-')}"


@pytest.mark.parametrize(
    ("recipe", "neurons", "parameters", "expectation"),
    [
        ("caneft_llama2", "835,584", "6,738,415,616", "43,286"),
        ("caneft_llama31", "1,048,576", "8,030,261,248", "56,372"),
        ("caneft_qwen25", "1,161,216", "7,615,616,512", "57,0"),
        ("caneft_llama33_70b", "5,242,880", "70,553,706,496", "563,716"),
        ("caneft_qwen25_72b", "5,386,240", "72,706,203,648", "581,326"),
        ("caneft_gemma2", "1,354,752", "9,241,705,984", "64,741"),
    ],
)
def test_dry_run_of_every_recipe(recipe, neurons, parameters, expectation, offline, capsys):
    (path,) = (path for path in RECIPES if path.stem == recipe)
    cli.main(load(path), ["--dry-run"])
    out = capsys.readouterr().out
    assert re.search(rf"^  neurons +{neurons}  = ", out, re.M)
    assert re.search(rf"^  parameters +{parameters}  in the model", out, re.M)
    assert re.search(rf"^  expectation +{expectation}", out, re.M)
    assert "on 8 GPU(s)" in out
    assert "optimizer steps" in out
    assert not list(offline.iterdir())  # nothing written


@pytest.mark.parametrize("recipe", ["caneft_llama33_70b", "caneft_qwen25_72b"])
@pytest.mark.parametrize(("gpus", "gigabytes"), [(8, 80), (16, 40)])
def test_a_model_larger_than_a_gpu_fits_partitioned(recipe, gpus, gigabytes, offline, capsys):
    (path,) = (path for path in RECIPES if path.stem == recipe)
    cli.main(load(path), ["--dry-run", "--gpus", str(gpus), "--gpu-memory", str(gigabytes)])
    out = capsys.readouterr().out
    assert re.search(r"^partition on: decoding with the whole model on each GPU takes 15\d\.\d GB, more", out, re.M)
    assert re.search(r"^  1\. as set \(scoring 4,096 tokens a batch, checkpointing, counts on the device; ", out, re.M)
    page = (FOLDER / "README.md").read_text()
    row = page[page.index(f"| {load(path).shape}: scoring") :].splitlines()
    sizes = re.search(r"^  1\. as set .*: ([\d., ]+) GB$", out, re.M)[1].split(", ")
    for stage, size, cells in zip(("scoring", "training", "decoding"), sizes, row, strict=False):
        assert cells.strip("| ").split(" | ")[2 if gpus == 8 else 3] == size, stage


def test_dry_run_of_tiny_builds_nothing(offline, monkeypatch, capsys):
    monkeypatch.setenv("SLICETUNE_CACHE", str(offline / "cache"))
    cli.main(load(RECIPES[0].with_name("caneft_tiny.py")), ["--dry-run"])
    assert f"{resolve('tiny').neurons:,}  = " in capsys.readouterr().out
    assert not list(offline.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_dry_run(path, offline, capsys):
    cli.main(load(path), ["--dry-run"])
    out = capsys.readouterr().out
    method = load(path).method
    assert ("optimizer steps" in out) == method.trains
    assert ("while scoring" in out) == method.scores


METHODS = [
    "base",
    "full",
    "lora",
    "lora_mlp",
    "dora",
    "llama_pro",
    "lape",
    "rcn",
    "caneft",
    "caneft_no_mdmtn",
    "caneft_no_mdcan",
]
BY_HAND = {
    # llama2: H 4096, I 11008, 32 layers; llama31: keys 1024, I 14336; qwen25: H 3584, keys 512, I 18944, 28 layers
    "full": (6_738_415_616, 8_030_261_248, 7_615_616_512),
    # r=8 × layers × Σ(in + out): 4·8192 + 3·15104; 2·8192 + 2·5120 + 3·18432; 2·7168 + 2·4096 + 3·22528
    "lora": (19_988_480, 20_971_520, 20_185_088),
    "lora_mlp": (11_599_872, 14_155_776, 15_138_816),
    # and one magnitude an output: 42496, 43008, 49664 a layer
    "dora": (21_348_352, 22_347_776, 21_575_680),
    # two blocks of 202,383,360, 218,112,000 and 233,057,792
    "llama_pro": (404_766_720, 436_224_000, 466_115_584),
    # 1 % of I × layers units (3,523, 4,588, 5,304) × 3H
    "lape": (43_290_624, 56_377_344, 57_028_608),
}


def test_there_is_a_recipe_for_every_row():
    models = ("llama2", "llama31", "qwen25", "tiny")
    rows = {f"{method}_{model}" for method in METHODS for model in models} | {"caneft_gemma2"}
    assert {path.stem for path in RECIPES} >= rows
    for row in rows:
        method = load(RECIPES[0].with_name(f"{row}.py")).method
        assert row.startswith(method.kind), row


@pytest.mark.parametrize("method", BY_HAND)
@pytest.mark.parametrize(("place", "model"), list(enumerate(["llama2", "llama31", "qwen25"])))
def test_parameters_counted_by_hand(method, place, model, offline, capsys):
    cli.main(load(RECIPES[0].with_name(f"{method}_{model}.py")), ["--dry-run"])
    out = capsys.readouterr().out
    number = f"{BY_HAND[method][place]:,}"
    assert re.search(rf"^  (trainable|exact) +{number}  = ", out, re.M)
    added = re.search(r"^  added +([\d,]+)", out, re.M)
    assert (added and added[1]) == {"full": "0", "lape": None}.get(method, number)


LANDERMT = {
    # adapters and LoRA by hand in test_bottleneck.py; full: embeddings, blocks, norms 250,880·4096, 30·201,379,840,
    # 4·4096, and 2·125,696·4096, 32·202,383,360, 4096
    "base": (0, 0),
    "few_shot": (0, 0),
    "adapter": (806_436_960, 860_199_424),
    "lora": (31_457_280, 50_331_648),
    "adapter_lora": (806_433_120, 876_972_544),
    "full": (7_069_016_064, 7_505_973_248),
    # four layers: 16,384·(2·4096 + 1) and 11,008·3·4096 of each; whole blocks; 1,639 and 1,101 specific units, the rest
    "landermt": (536_936_448, 541_065_216),
    "layers": (805_519_360, 809_533_440),
    "ls": (53_713_308, 54_116_352),
    "lg": (483_223_140, 486_948_864),
}
TEN = {f"{a}-{b}" for other in ("de", "fr", "it", "zh", "ar") for a, b in (("en", other), (other, "en"))}


@pytest.mark.parametrize("row", LANDERMT)
@pytest.mark.parametrize(("place", "model"), [(0, "bloom"), (1, "baichuan2")])
def test_rows_of_landermts_tables(row, place, model):
    config = load(RECIPES[0].with_name(f"{row}_{model}.py"))
    assert config.method.kind == row
    assert config.method.bounds(resolve("no-such-model", config.shape)).exact == LANDERMT[row][place]
    assert set(config.data.pairs) == TEN
    assert config.data.prompt == "templates"
    assert config.evaluate.smooth == "none"
    if config.method.trains:
        assert (config.train.learning_rate, config.train.weight_decay, config.train.epochs) == (5e-5, 0.01, 1)
        assert (config.train.global_batch_size, config.train.micro_batch_size) == (80, 8)
        assert config.train_sentences == 100_000  # of a direction: 12,500 iterations of 8


ON_TINY = ["base", "few_shot", "adapter", "lora", "adapter_lora", "full", "landermt", "layers", "ls", "lg"]


@pytest.mark.parametrize(("model", "blocks"), [("bloom", 805_519_360), ("baichuan2", 809_533_440)])
def test_the_papers_count_is_that_of_whole_blocks(model, blocks):
    config = load(RECIPES[0].with_name(f"landermt_{model}.py"))
    whole = dataclasses.replace(config.method, attention=True)
    assert whole.bounds(resolve("no-such-model", config.shape)).exact == blocks


@pytest.mark.parametrize("row", ON_TINY)
def test_rows_of_several_directions_on_tiny(row):
    config = load(RECIPES[0].with_name(f"{row}_pairs_tiny.py"))
    assert (config.model.path, config.data.pairs) == ("tiny-pairs", ("de-en", "en-de"))


def test_ablations_and_the_control_differ_from_caneft_in_one_thing():
    for model in ("llama2", "llama31", "qwen25", "tiny"):
        caneft, no_task, no_mi, rcn = (
            load(RECIPES[0].with_name(f"{name}_{model}.py"))
            for name in ("caneft", "caneft_no_mdmtn", "caneft_no_mdcan", "rcn")
        )
        assert (no_task.method, no_mi.method) == (Caneft(task_ratio=None), Caneft(consensus=None))
        assert vars(rcn.method) == vars(caneft.method)
        for other in (no_task, no_mi, rcn):
            assert (other.train, other.data, other.model) == (caneft.train, caneft.data, caneft.model)


def test_recipe_as_a_program(tmp_path):
    (recipe,) = (path for path in RECIPES if path.stem == "caneft_llama31")
    command = [sys.executable, str(recipe), "--dry-run", "--zero.stage", "2", "--data.seen", "it", "law"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ZeRO stage 2" in done.stdout
    assert "2 domains × 131,072 neurons of 4 of 32 layers × 256 bins" in done.stdout


def test_flags_override_the_recipe():
    defaults = RunConfig(train=TrainConfig(learning_rate=3e-4))
    args = [
        "--train.epochs",
        "7",
        "--data.seen",
        "it",
        "law",
        "--dry-run",
        "--method.task-ratio",
        "None",
        "--no-deterministic",
    ]
    got = cli.parse(defaults, args)
    assert (got.train.epochs, got.train.learning_rate) == (7, 3e-4)
    assert got.data.seen == ("it", "law")
    assert got.dry_run
    assert cli.parse(defaults, ["--method.task-ratio", "None"]).method.task_ratio is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--train.learning-rate", "-1"], "--train.learning-rate -1.0: must be above 0"),
        (["--data.pair", "deen"], "write source-target"),
        (["--method.neuron-ratio", "2"], "at most 1"),
        (["--dry-run", "--shape", "GPT-5"], "--shape Llama-2-7B"),
        (["--method.bins", "1"], "must be at least 2"),
    ],
)
def test_a_wrong_setting_is_one_line_and_code_2(args, words, offline, capsys):
    defaults = RunConfig()
    defaults.model.path = "some/model"
    with pytest.raises(SystemExit) as stop:
        cli.main(defaults, args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .*\n", err)
    assert words in err


def test_an_unknown_flag_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(RunConfig(), ["--train.learnin-rate", "1"])
    assert stop.value.code == 2
    assert "--train.learning-rate" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(how, monkeypatch):
    args = ["--train.learning-rate", "-1"]
    if how == "flag":
        args.append("--debug")
    else:
        monkeypatch.setenv("SLICETUNE_DEBUG", "1")
    with pytest.raises(UserError, match="must be above 0"):
        cli.main(RunConfig(), args)


def started_by_torchrun(monkeypatch, rank: int, world: int) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


def test_errors_of_a_run_name_the_rank(monkeypatch, capsys):
    def fail(config):
        raise UserError("data/it.jsonl: line 3\nis no JSON")

    monkeypatch.setattr(cli, "run", fail)
    started_by_torchrun(monkeypatch, 2, 4)
    with pytest.raises(SystemExit) as stop:
        cli.main(RunConfig(), [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: rank 2: data/it.jsonl: line 3 is no JSON\n"


def test_a_recipes_shape_is_not_lent_to_another_model(offline, capsys):
    (path,) = (path for path in RECIPES if path.stem == "caneft_llama31")
    with pytest.raises(SystemExit):
        cli.main(load(path), ["--dry-run", "--model.path", "someone/other-model"])
    assert "someone/other-model: no config.json" in capsys.readouterr().err
    cli.main(load(path), ["--dry-run", "--model.path", "someone/other-model", "--shape", "Qwen2.5-7B"])
    assert "1,161,216" in capsys.readouterr().out
    cli.main(load(path), ["--dry-run", "--model.path", "someone/other-model", "--shape", "Llama-3.1-8B"])
    assert "1,048,576" in capsys.readouterr().out  # named, it is taken, though it is the recipe's too


def test_a_dry_run_counts_with_the_gpus_that_it_is_told(offline, capsys):
    (path,) = (path for path in RECIPES if path.stem == "caneft_llama31")
    cli.main(load(path), ["--dry-run", "--gpus", "4", "--gpu-memory", "24"])
    out = capsys.readouterr().out
    assert "on 4 GPU(s), one rank each (24.0 GB each)" in out
    assert "What fits in 4 × 24.0 GB" in out
    assert "assumed: add --gpus" not in out
    cli.main(load(path), ["--dry-run", "--gpu-memory", "24"])
    assert capsys.readouterr().out.endswith("\n8 GPUs were assumed: add --gpus 1 if you have one\n")
    with pytest.raises(SystemExit):
        cli.main(load(path), ["--gpus", "4"])
    assert "--gpus and --gpu-memory are what --dry-run counts with" in capsys.readouterr().err


def test_torchruns_other_ranks_are_silent(offline, monkeypatch, capsys):
    (path,) = (path for path in RECIPES if path.stem == "caneft_tiny")
    for rank in (0, 1):
        started_by_torchrun(monkeypatch, rank, 2)
        cli.main(load(path), ["--dry-run"])
        out = capsys.readouterr().out
        assert ("on 2 GPU(s)" in out) == (rank == 0)
        assert bool(out) == (rank == 0)


def test_the_dry_run_says_which_layers_are_taken_instead(tmp_path, capsys):
    toys.bloom().save_pretrained(tmp_path)
    lora = Lora(rank=2, target_modules=("q_proj",))
    config = RunConfig(model=ModelConfig(path=str(tmp_path)), method=lora, dry_run=True, gpus=1)
    cli.dry_run(config)
    out = capsys.readouterr().out
    assert f"--method.target-modules q_proj: {tmp_path} has none of these; all linear layers of the blocks are" in out
    assert f"trainable   {Lora(rank=2).bounds(resolve(str(tmp_path))).exact:>15,}  =" in out
    with pytest.raises(UserError, match="wants 0 units"):
        cli.dry_run(dataclasses.replace(config, method=Lape(neuron_ratio=1e-6)))
