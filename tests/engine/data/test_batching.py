"""Batches index what they should, and the order of training is a function of (seed, epoch, step) alone."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slicetune.engine.data.batching import Example, batches_by_tokens, pack, pad
from slicetune.engine.data.draws import shuffled
from slicetune.engine.training.order import Order, share

SAMPLES = [
    Example([5, 6, 7, 8, 9], 3, 1, "it/train/1"),
    Example([1, 2], 1, 0, "law/train/7"),
    Example([3, 4, 0, 0], 2, 1, "it/train/4"),
]


def expected(samples):
    """(context, token to predict, sample) of every target token, straight from the definition."""
    return [
        (e.input_ids[:i], e.input_ids[i], s)
        for s, e in enumerate(samples)
        for i in range(e.target_start, len(e.input_ids))
    ]


@pytest.mark.parametrize("make", [pack, lambda samples: pad(samples, 0)])
def test_every_target_token_is_predicted_from_its_own_context(make):
    batch = make(SAMPLES)
    flat = batch.input_ids.flatten().tolist()
    found = []
    for at, token, sample in zip(
        batch.predict.tolist(), batch.target.tolist(), batch.target_sample.tolist(), strict=True
    ):
        start, end = batch.segments[sample].tolist()
        assert start <= at < end
        found.append((flat[start : at + 1], token, sample))
    assert found == expected(SAMPLES)


@pytest.mark.parametrize("make", [pack, lambda samples: pad(samples, 0)])
def test_segments(make):
    batch = make(SAMPLES)
    flat = batch.input_ids.flatten().tolist()
    assert [flat[a:b] for a, b in batch.segments.tolist()] == [e.input_ids for e in SAMPLES]
    predicting = [position for a, b in batch.target_segments.tolist() for position in range(a, b)]
    assert predicting == batch.predict.tolist()
    assert batch.groups.tolist() == [1, 0, 1]
    assert batch.uids == ["it/train/1", "law/train/7", "it/train/4"]
    assert batch.weight.tolist() == [1, 1, 1]
    types = {"input_ids": torch.int64, "segments": torch.int32, "target_segments": torch.int32, "predict": torch.int64}
    types |= {"target": torch.int64, "target_sample": torch.int64, "groups": torch.int64, "weight": torch.float32}
    assert {name: getattr(batch, name).dtype for name in types} == types


def test_packed_positions_restart():
    batch = pack(SAMPLES)
    assert batch.input_ids.shape == (1, 11)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]]


def test_padding_is_on_the_right():
    batch = pad(SAMPLES, 99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 99, 99, 99], [3, 4, 0, 0, 99]]
    assert batch.position_ids is None


def test_padding_with_the_end_token_masks_no_label():
    end = 9
    batch = pad(SAMPLES, end)
    assert batch.target.tolist() == [token for _, token, _ in expected(SAMPLES)]
    assert end in batch.target.tolist()


def test_weights_and_device():
    batch = pack(SAMPLES, [1, 0, 1]).to("cpu")
    assert batch.weight.tolist() == [1, 0, 1]
    assert batch.uids == ["it/train/1", "law/train/7", "it/train/4"]
    assert batch.to("meta").input_ids.device.type == "meta"


@pytest.mark.parametrize("start", [0, 2])
def test_a_sample_without_a_label_is_refused(start):
    with pytest.raises(AssertionError, match="without a token to predict"):
        pack([Example([1, 2], start, 0, "it/train/1")])


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=1, attn_implementation="sdpa", **sizes)
    return LlamaForCausalLM(config).eval().double()


def test_packed_padded_and_single_logits_agree():
    """Samples do not interact: each sample's logits are those that it gets alone."""
    model = tiny_llama()
    packed, padded = pack(SAMPLES), pad(SAMPLES, 0)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([e.input_ids]), use_cache=False).logits[0] for e in SAMPLES])
        own = model(packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits.flatten(0, 1)
        rows = model(padded.input_ids, use_cache=False).logits.flatten(0, 1)
        one_text = model(packed.input_ids, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(own, alone)
    torch.testing.assert_close(rows[padded.predict], alone[packed.predict])
    assert (one_text - alone).abs().max() > 1e-3  # without the positions they do interact: the check can fail


def of_lengths(lengths):
    return [Example([1] * n, 1, 0, str(i)) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(2, 40), max_size=40), st.integers(1, 100), st.booleans())
@settings(max_examples=60, deadline=None)
def test_batches_cover_all_within_the_budget(lengths, budget, packed):
    batches = list(batches_by_tokens(of_lengths(lengths), budget, packed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches == list(batches_by_tokens(of_lengths(lengths), budget, packed))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or (sum(sizes) if packed else len(sizes) * max(sizes)) <= budget
    longest_first = [lengths[i] for batch in batches for i in batch]
    assert longest_first == sorted(lengths, reverse=True)


def test_batches_fill_the_budget():
    assert list(batches_by_tokens(of_lengths([4, 2, 4, 6, 2]), 8, True)) == [[3], [0, 2], [1, 4]]
    assert list(batches_by_tokens(of_lengths([4, 3, 3, 3, 2]), 9, False)) == [[0, 1], [2, 3, 4]]


def test_an_epoch_reads_every_sentence_once():
    order = Order(7, 23, 5)
    assert order.updates_per_epoch == 5
    updates = [order.update(0, step) for step in range(5)]
    assert [len(update) for update in updates] == [5, 5, 5, 5, 3]
    assert sorted(i for update in updates for i in update) == list(range(23))


def test_resumed_order_equals_the_unbroken_one():
    unbroken = Order(7, 23, 5)
    all_updates = {(epoch, step): unbroken.update(epoch, step) for epoch in range(3) for step in range(5)}
    for (epoch, step), update in reversed(all_updates.items()):
        assert Order(7, 23, 5).update(epoch, step) == update
        assert unbroken.update(epoch, step) == update
    assert all_updates[0, 0] != all_updates[1, 0]
    assert Order(8, 23, 5).update(0, 0) != all_updates[0, 0]


def test_order_is_the_same_in_every_version():
    """A run may resume under other versions of Python, NumPy and torch: these numbers may never change."""
    assert Order(0, 10, 10).update(0, 0) == [2, 9, 1, 7, 6, 8, 0, 4, 3, 5]


def test_past_the_end_of_an_epoch():
    with pytest.raises(AssertionError, match="an epoch has 5 updates"):
        Order(7, 23, 5).update(0, 5)


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_share_deals_every_sentence_out_once(count, world, accumulation):
    indices = shuffled(range(100, 100 + count), "test")
    shares = [share(indices, rank, world, accumulation) for rank in range(world)]
    assert all(len(micro_batches) == accumulation for micro_batches in shares)
    dealt = [i for micro_batches in shares for micro in micro_batches for i in micro]
    assert sorted(dealt) == sorted(indices)
    sizes = [len(micro) for micro_batches in shares for micro in micro_batches]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_left_over_gets_nothing():
    assert [share([4, 2, 9, 7, 1], rank, 8, 1) for rank in range(8)] == [
        [[4]],
        [[2]],
        [[9]],
        [[7]],
        [[1]],
        [[]],
        [[]],
        [[]],
    ]


def test_shuffled_keeps_the_order_of_what_is_left():
    whole = shuffled(range(50), "key", 3)
    assert sorted(whole) == list(range(50)) != whole
    assert shuffled([i for i in range(50) if i % 7], "key", 3) == [i for i in whole if i % 7]
    assert shuffled(range(50), "key", 4) != whole


class Words:
    """A tokenizer of one token a word; 0 ends."""

    chat_template = None
    bos_token_id = None
    eos_token_id = 0
    name_or_path = "words"
    added_tokens_decoder = {0: SimpleNamespace(special=True)}  # noqa: RUF012
    all_special_ids = [0]  # noqa: RUF012

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1 + len(word) for word in text.split()]}

    def convert_ids_to_tokens(self, i):
        return "<end>"


def test_long_sentences_are_dropped_whole_and_counted():
    from slicetune.engine.data.config import DataConfig
    from slicetune.engine.data.examples import encode_pairs
    from slicetune.engine.data.records import Pair

    data = DataConfig(prompt="{tgt}:", seen=("law", "it"))
    pairs = [
        Pair("eins zwei", "one two", "it", 3, ("de", "en")),
        Pair("a " * 20, "one", "it", 4, ("de", "en")),
        Pair("eins", "b " * 20, "law", 9, ("de", "en")),
        Pair("eins", "one", "law", 11, ("de", "en")),
    ]
    # prompt: "English:" "German:" words "English:"; then the words and the end token
    kept, dropped = encode_pairs(Words(), data, pairs, data.seen, "train", 8)
    assert [(e.uid, e.group, e.target_start, len(e.input_ids)) for e in kept] == [
        ("it/train/3", 1, 5, 8),
        ("law/train/11", 0, 4, 6),
    ]
    assert dropped == {"it: the prompt alone has 8 tokens or more": 1, "law: longer than 8 tokens": 1}
