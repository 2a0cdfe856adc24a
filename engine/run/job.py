"""What a run's stages and an analysis are given: settings, sentences, the base model, its tokenizer and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common import distributed
from ..common.errors import UserError
from ..common.files import contents
from ..common.settings import as_dict
from ..data import corpus
from ..data.batching import Example
from ..data.examples import encode_pairs
from ..data.records import Pair
from ..data.tokenizer import spelling, tokens
from ..models import attention, baichuan, kinds, load
from ..models.config import ModelConfig
from ..models.shapes import ModelShape, from_config
from ..scoring.cross_entropy import loss_path
from .config import RunConfig
from .forecast.estimate import chosen
from .forecast.partition import decided, partition
from .forecast.settle import Settled, line, settle


class Inputs:
    """A run's base model and sentences, as its settings name them. Every rank makes one."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.directions = corpus.directions(config.data)
        self.base = Path(distributed.first_rank_first(lambda: load.snapshot(config.model.path)))
        self.tokenizer = load.load_tokenizer(str(self.base))
        self.pad_id: int = self.tokenizer.pad_token_id
        self.shape: ModelShape = from_config(load.config_json(self.base))
        self.device = distributed.device()
        size, self.room = distributed.gpu_memory()
        if self.room:  # what is counted asks the method: a layer that the model has not is one line of the first rank
            distributed.first(lambda: config.method.bounds(self.shape))
        self.partitioned, self.why = self._partition(size)
        self.settled: Settled = settle(decided(config, self.partitioned), self.shape, distributed.world(), self.room)
        """What is left to the run, for each stage; config.json keeps `auto`."""

    def _partition(self, size: int | None) -> tuple[bool, str]:
        """Whether ranks hold a part of each weight, and why, on GPUs of `size` bytes. An analysis has whole models."""
        return False, ""

    @property
    def scoring(self) -> RunConfig:
        """The settings of scoring, and of an analysis."""
        return self.settled.scoring.config if self.settled.scoring else decided(self.config, self.partitioned)

    @property
    def training(self) -> RunConfig:
        """The settings of training."""
        return self.settled.training.config if self.settled.training else decided(self.config, self.partitioned)

    def model(self, folder: Path | None = None, stage: RunConfig | None = None) -> nn.Module:
        """The frozen base, or the exported model in `folder`, whole on this rank's device.

        `stage` has the settings (None: as for scoring). The base is quantised where --model.quantize says so, an
        exported model never is.
        """
        return load.load_model(str(folder or self.base), self.settings(folder, stage), self.device)

    def settings(self, folder: Path | None = None, stage: RunConfig | None = None) -> ModelConfig:
        """How the base, or the exported model in `folder`, is loaded for a stage."""
        model = (stage or self.scoring).model
        return model if folder is None else replace(model, quantize="none")


class Job(Inputs):
    """One run: its inputs, checked, and its folder."""

    def __init__(self, config: RunConfig) -> None:
        self.out = Path(config.out)
        self.report = distributed.first_rank_first(lambda: corpus.check(config.data))  # before any weight is fetched
        distributed.print0(self.report)
        super().__init__(config)
        lost = lambda: spelling.lost_by_split(self.tokenizer, self.directions, config.seed)  # noqa: E731
        self.lost: dict[str, spelling.Lost] = distributed.share_object(distributed.first(lost))
        for name, targets in self.lost.items():
            distributed.print0(targets.line(name))
        distributed.print0(self._capabilities())
        if self.partitioned or self.room:
            distributed.print0(self.why)
        if self.room and self.settled.stages:
            distributed.print0(line(self.settled, self.room))

    def _partition(self, size: int | None) -> tuple[bool, str]:
        return partition(self.config, self.shape, distributed.world(), size)

    def training_once_chosen(self) -> RunConfig:
        """The settings of training, counted again with the neurons that were chosen: they can be dearer than expected.

        Printed where that changes them.
        """
        if not (self.room and self.settled.training):
            return self.training
        whole, counts = decided(self.config, self.partitioned), chosen(self.config, self.shape)
        again = settle(whole, self.shape, distributed.world(), self.room, counts).training
        assert again is not None
        if again.words != self.settled.training.words or not again.fits:
            distributed.print0(f"with the {counts.likely:,} parameters that are trained: {again}")
        self.settled = replace(self.settled, training=again)
        return self.training

    @property
    def stage(self) -> int:
        """ZeRO's in training."""
        return 3 if self.partitioned else self.config.zero.stage

    @property
    def held(self) -> load.Held:
        """What a rank has of a model that is scored or trained."""
        return "partitioned" if self.partitioned else "whole"

    def model(self, folder: Path | None = None, stage: RunConfig | None = None) -> nn.Module:
        """As of Inputs; of a partitioned model this rank's part."""
        return load.load_model(str(folder or self.base), self.settings(folder, stage), self.device, held=self.held)

    def decoder(self, folder: Path | None = None) -> nn.Module:
        """The base, or the exported model in `folder`, to decode: whole, or cut by tensors where it is partitioned.

        The base is quantised if that is what is to be measured.
        """
        folder = self.base if folder is None and self.config.measured_on == "full" else folder
        if self.partitioned and load.ranks_together(folder or self.base) > 1:
            return load.load_model(str(folder or self.base), self.settings(folder), self.device, held="parallel")
        return self.model(folder)

    def _capabilities(self) -> str:
        model, device = self.config.model, self.device
        dtype = load.model_dtype(model.dtype, device)
        path = attention.attention_path(model.attention, device, load.config_json(self.base), dtype)
        over = f" over {model.quantize}" * self.config.quantised
        return (
            f"{distributed.world()} rank(s) on {device.type}, torch {torch.__version__}, "
            f"{str(dtype).removeprefix('torch.')}{over}, attention {path.removeprefix('slicetune_')}, loss in "
            f"{loss_path(device)}, ZeRO stage {self.stage}; {self.shape.name}: {self.shape.neurons:,} "
            f"neurons, {self.shape.parameters:,} parameters"
        )

    def method_settings(self) -> dict[str, Any]:
        """What the choice of neurons and the training depend on: the method's fields, and the files that they name."""
        method = self.config.method
        files = distributed.share_object(distributed.first(lambda: contents(method.reads)))
        return {"method": as_dict(method)} | ({"method_files": files} if files else {})

    @property
    def systems(self) -> list[str]:
        """What is decoded: the base model unless that was turned off, and what the method makes of it."""
        method = self.config.method
        return ["base"] * (self.config.evaluate.base or method.is_base) + [method.kind] * (not method.is_base)

    @property
    def base_name(self) -> str:
        """What an adapter names as its base: a hub id, or the folder that was read, found from everywhere."""
        name = load.resolve(self.config.model.path)
        local = Path(name).is_dir() or self.base.name.startswith(baichuan.PREFIX)
        return str(self.base.resolve()) if local else name

    def examples(self, split: str, limit: int, only: Sequence[str] = ()) -> list[Example]:
        """Tokenised sentences of the seen domains of each direction, or of those; what was dropped is printed."""
        kept, seed = [], self.config.seed
        for data in (one for one in self.directions if not only or one.pair in only):
            for domain in data.seen:
                pairs = corpus.load_domain(data, domain, split, limit, seed)
                found, dropped = encode_pairs(self.tokenizer, data, pairs, data.groups, split, data.max_length, seed)
                for reason, count in dropped.items():
                    distributed.print0(f"{split}: {count} of {len(pairs)} sentences dropped, {reason}")
                if not found:
                    name = f"{data.name(domain)}/{split}"
                    raise UserError(f"{name}: no sentence is left: raise --data.max-length, or look at the file")
                kept += found
        named = [(each.uid, each.input_ids) for each in kept]
        tokens.check(self.tokenizer, named, self.shape.vocab)
        kinds.look_at_lengths(load.config_json(self.base), named)
        return kept

    def tests(self) -> dict[str, list[Pair]]:
        """Sentences to decode, by the name of their domain in the run: first a direction's seen, then its unseen."""
        limit = self.config.data.test_sentences
        return {
            data.name(domain): corpus.load_domain(data, domain, "test", limit)
            for data in self.directions
            for domain in data.domains
        }
