"""CTranslate2: ct2-transformers-converter on model/, then greedy decoding of the same prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ctranslate2
from shared import WORK, finish, tokens_row, truth
from transformers import AutoTokenizer


def converted(folder: str, out: Path) -> Path:
    """The model in CTranslate2's format, float32."""
    program = Path(sys.executable).with_name("ct2-transformers-converter")
    words = [program, "--model", folder, "--output_dir", out, "--quantization", "float32", "--force"]
    subprocess.run([str(word) for word in words], check=True)
    return out


def translations(folder: str, out: Path) -> list[list[int]]:
    """Greedy tokens of all prompts."""
    known, tokenizer = truth(), AutoTokenizer.from_pretrained(folder)
    generator = ctranslate2.Generator(str(out), compute_type="float32", intra_threads=2)
    answers = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in known["prompts"]],
        max_length=known["new"],
        sampling_topk=1,
        beam_size=1,
        end_token=known["end"],
        include_prompt_in_result=False,
    )
    return [answer.sequences_ids[0] for answer in answers]


if __name__ == "__main__":
    for system in ("run", "own"):
        folder = truth()["models"][system]
        out = converted(folder, WORK / "ctranslate2" / system)
        tokens_row(f"{system}: converted and decoded", translations(folder, out), system)
    finish("ctranslate2", "transformers")
