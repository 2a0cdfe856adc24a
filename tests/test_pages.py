"""The pages: commands, flags, paths and Python that README.md and the rooms' READMEs name are there, and what they show
of the optimizer, neuron sets and kernels is run, with torch alone."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from slicetune.engine.methods.kinds import METHODS
from slicetune.engine.run import cli
from slicetune.engine.run.compare import load_recipe
from slicetune.engine.run.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("engine/*/README.md"), *ROOT.glob("[krb]*/README.md")})
HARMLESS = ("hf", "source", "export", "vllm")
"""Programs that are not ours."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def inline(page: Path) -> list[str]:
    """Inline code outside of fenced blocks; a table's `\\|` is a plain bar."""
    text = FENCE.sub("", page.read_text()).replace("\\|", "|")
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def lines(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words: without comments, variables before them and the scheduler's srun."""
    for line in block.replace("\\\n", " ").splitlines():
        words = [] if "$(" in line else shlex.split(line, comments=True)
        while words and (words[0] == "srun" or re.match(r"\w+=", words[0])):
            words = words[1:]
        if words:
            yield [each for word in words for each in braces(word)]


def braces(word: str) -> list[str]:
    """a_{b,c} → a_b, a_c, as a shell does."""
    head, found, tail = re.fullmatch(r"(.*?)(?:\{([\w,]+)\}(.*))?", word).groups()
    return [word] if found is None else [f"{head}{each}{tail}" for each in found.split(",")]


@functools.cache
def help_of(*words: str) -> str:
    """What a command says with --help, in this process; it must end with 0."""
    said, argv, watched = io.StringIO(), sys.argv, (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in watched]
    try:
        sys.argv = ["slicetune", *words, "--help"]
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
            runpy.run_module("slicetune.engine", run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv
        for number, handler in zip(watched, handlers, strict=True):
            signal.signal(number, handler)
    assert not stop.value.code, words
    return said.getvalue()


def check_command(name: str, *words: str) -> None:
    """`slicetune` and these words: a command (and question) that is there, with flags that its help lists."""
    from slicetune.engine.commands import COMMANDS

    assert name in COMMANDS or name == "COMMAND" or name.startswith("--"), name
    if name == "compare":
        place = next((i for i, word in enumerate(words) if re.match(r"--\w+\.", word)), len(words))
        words, dotted = words[:place], words[place:]
        for recipe in itertools.takewhile(lambda word: not word.startswith("--") and word != "RECIPES", words):
            cli.parse(load_recipe(ROOT / recipe if recipe.endswith(".py") else Path(recipe)), dotted)
    shown = words[: name == "ask" and words[:1] != ("QUESTION",)]  # each question has a help of its own
    if name == "select" and "--method" in words:
        shown = words[words.index("--method") :][:2]
    for flag in (word for word in words if word.startswith("--")):
        assert re.search(rf"{flag}(?![\w.-])", help_of(name, *shown)), words
    assert name not in COMMANDS or help_of(name, *shown)


def check_program(name: str, words: list[str], module: bool) -> None:
    """What python or torchrun are to run: our commands, recipes as files or modules, other modules and files."""
    if module and name == "slicetune.engine":
        check_command(*words)
    elif name.startswith(("recipes/", "slicetune.recipes.")):
        path = name.removeprefix("slicetune.").replace(".", "/") + ".py" if module else name
        cli.parse(load_recipe(ROOT / path), words)
    elif module:
        assert importlib.util.find_spec(name), name
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
    else:
        assert (ROOT / name).is_file(), name


def check_line(words: list[str]) -> None:
    """One command of a shell block, or one that the text names."""
    program, words = Path(words[0]).name, words[1:]
    if program == "torchrun":
        given = get_args_parser().parse_args(words)
        check_program(given.training_script, given.training_script_args, given.module)
    elif program.startswith("python"):
        module = words[0] == "-m"
        check_program(words[module], words[module + 1 :], module)
    elif program == "slicetune":
        check_command(*words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert not [word for word in words if "=" not in word and word not in targets], words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {extra for word in words for found in re.findall(r"\[(.*)\]$", word) for extra in found.split(",")}
        assert named <= extras.keys(), words
    else:
        assert program in HARMLESS, program


@functools.cache
def flags() -> set[str]:
    """Every dotted flag that some recipe has."""
    parts = [*vars(RunConfig()).items(), *(("method", method) for method in METHODS.values())]
    configs = [(part, config) for part, config in parts if dataclasses.is_dataclass(config)]
    names = {f"{part}.{no}{f.name}" for part, one in configs for f in dataclasses.fields(one) for no in ("", "no_")}
    return {f"--{name}".replace("_", "-") for name in names}


@pages
def test_commands_exist_with_their_flags(page):
    named = [code for code in inline(page) if re.match(r"(slicetune|make|pip) |(torchrun|python)\b.*( -m|\.py) ", code)]
    for code in (*blocks(page, "bash"), *named):
        for words in lines(code):
            check_line(words)


@pages
def test_flags_in_the_text_exist(page):
    named = {flag for code in inline(page) for flag in re.findall(r"--\w+\.[a-z][\w-]*", code)}
    assert named <= flags(), named - flags()


@pages
def test_python_compiles_and_its_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            for name in node.names if isinstance(node, ast.ImportFrom) else ():
                module = importlib.import_module(node.module)
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


@pages
def test_links_paths_and_questions_exist(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))]
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
    for code in inline(page):
        if re.match(r"(engine|kernels|recipes|tests|bench|\.ci)/", code) and "<" not in code:
            assert list(ROOT.glob(code)), code
        if re.fullmatch(r"[a-z0-9_]+_\*", code):
            assert list(ROOT.glob(f"recipes/{code}.py")), code
        if page.parent.name == "analyses" and (question := re.match(r"([a-z]+) RUN", code)):
            check_command("ask", question[1])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_python_of_the_pages_runs_with_torch_alone(tmp_path):
    """The optimizer and a neuron set around a toy model, and the kernels; page_blocks.py says what must come of it."""
    readme, slices, kernels = (ROOT / page for page in ("README.md", "engine/slices/README.md", "kernels/README.md"))
    diff = "\n".join(line[1:] for line in blocks(readme, "diff")[0].splitlines() if line[:1] in "+ ")
    first, second, *_ = blocks(slices, "python")
    shown = [diff, first, *blocks(readme, "python"), second, *blocks(kernels, "python")]
    (tmp_path / "blocks.txt").write_text("\f".join(shown))
    program = Path(__file__).parent / "support" / "page_blocks.py"
    done = subprocess.run([sys.executable, "-P", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
