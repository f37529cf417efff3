"""The padding that the finetune stage reports is that of the micro-batches in training."""

import dataclasses

import pytest
from tiny_run import CONFIG, PAD_ID, random_examples

from lark_jax.finetuning.data import TrainingSet, cut
from lark_jax.finetuning.padding_report import padding_report


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("devices", [1, 2])
def test_padding_and_shapes_are_those_of_an_epoch(packing: bool, devices: int) -> None:
    examples = random_examples(5, 20, 2)
    config = dataclasses.replace(CONFIG, packing=packing, batch_size=12, tokens_per_batch=400)
    data = TrainingSet(examples, config.batch_size, 3)
    micro_batches = [
        micro
        for step in range(data.steps_per_epoch)
        for micro in cut(data, data.batch(step), config, data_shards=devices, pad_id=PAD_ID)
    ]
    report = padding_report(examples, config, seed=3, data_shards=devices)
    tokens = sum(example.rendered.num_inputs for example in examples)
    slots = sum(micro.tokens_bt.size for micro in micro_batches)
    assert report.counts() == {"tokens per epoch": tokens, "padding tokens per epoch": slots - tokens}
    assert report.used.padding == pytest.approx(1 - tokens / slots)
    assert set(report.used.shapes) == {micro.tokens_bt.shape[::-1] for micro in micro_batches}
    assert {micro.segment_ids_bt is not None for micro in micro_batches} == {packing}
    other = padding_report(examples, dataclasses.replace(config, packing=not packing), seed=3, data_shards=devices)
    assert (other.used, other.other) == (report.other, report.used)
    assert report.notes()["used"] == ("packed" if packing else "one trajectory a row")
    assert str(report).startswith("rows, packed: " if packing else "rows, one trajectory a row: ")
