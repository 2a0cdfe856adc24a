"""Saves two small COMET checkpoints with random weights, by COMET itself: `kiwi` (no reference) and `da` (with one).

    .venv-comet/bin/python tests/support/tiny_comet.py FOLDER   # FOLDER/{kiwi,da}/{hparams.yaml,checkpoints/model.ckpt}

They have the classes and settings of wmt22-cometkiwi-da and wmt22-comet-da; encoder and tokenizer are made here too.
"""

import sys
from pathlib import Path

import pytorch_lightning
import torch
import yaml
from comet.models import RegressionMetric, UnifiedMetric
from tokenizers import SentencePieceUnigramTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizerFast

TEXT = ["Die Anlage wird geprüft.", "The annex is being checked.", "Der Ausschlag klingt ab.", "The rash fades."]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def encoder(folder):
    """A tokenizer and the config of a small XLM-R in `folder`; COMET's checkpoint holds the weights."""
    tokenizer = SentencePieceUnigramTokenizer()
    tokenizer.train_from_iterator(TEXT * 20, vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>")
    ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    pair = "<s> $A </s> </s> $B </s>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=ends)
    tokens = dict(zip(["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"], SPECIAL, strict=True))
    fast = XLMRobertaTokenizerFast(tokenizer_object=tokenizer._tokenizer, **tokens)
    fast.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=130,
        type_vocab_size=1,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


def save(model, folder):
    """As COMET's training does: Lightning's checkpoint, and hparams.yaml beside it."""
    trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "checkpoints" / "model.ckpt")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(dict(model.hparams)))


def main(out):
    torch.manual_seed(0)
    encoder(out / "encoder")
    common = {"pretrained_model": str(out / "encoder"), "hidden_sizes": [16], "load_pretrained_weights": False}
    kiwi = {"input_segments": ["mt", "src"], "word_layer": 2, "layer_transformation": "softmax"}
    save(UnifiedMetric(**common, **kiwi), out / "kiwi")
    save(RegressionMetric(**common, layer="mix", pool="avg"), out / "da")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
