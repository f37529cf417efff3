"""Windows of a trajectory and the rows that they are packed into, against plain lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lark_jax.scoring.local_naturalness.windows import SHORTEST_ROW, WindowText, batch_rows, pack_rows, windows_of

STEP_SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=20)


@given(STEP_SIZES, st.integers(0, 6))
def test_each_token_is_scored_once_after_the_steps_that_it_may_see(step_sizes: list[int], context: int) -> None:
    step_of = np.repeat(np.arange(len(step_sizes)), step_sizes)
    windows = windows_of(np.array(step_sizes), context)
    scored_in = {token: start for start, scored, stop in zip(*windows, strict=True) for token in range(scored, stop)}
    assert list(scored_in) == list(range(len(step_of)))
    for token, start in scored_in.items():
        first = max(0, step_of[token] - context)
        assert start == np.flatnonzero(step_of == first)[0]
    assert (windows.lengths >= 1).all()
    assert len(windows.starts) == max(1, len(step_sizes) - context)


def random_windows(rng: np.random.Generator, count: int, longest: int) -> list[WindowText]:
    windows = []
    for number in range(count):
        tokens = rng.integers(1, 1_000, int(rng.integers(2, longest + 2)))
        num_scored = int(rng.integers(1, len(tokens)))
        windows.append(WindowText(tokens, num_scored, np.full(num_scored, number)))
    return windows


@pytest.mark.parametrize(("devices", "tokens_per_batch"), [(1, 512), (2, 2_048), (3, 4_000)])
def test_rows_hold_every_window_whole_and_name_its_scored_tokens(devices: int, tokens_per_batch: int) -> None:
    rng = np.random.default_rng()
    by_prompt = [random_windows(rng, int(rng.integers(1, 30)), longest) for longest in (40, 300, 700)]
    prefixes = [0, 17, 250]
    rows = [row for prompt, windows in enumerate(by_prompt) for row in pack_rows(windows, prompt, prefixes[prompt])]
    found: list[tuple] = []
    for batch in batch_rows(rows, tokens_per_batch, devices, pad_id=0):
        per_device, length = batch.tokens_bt.shape[0] // devices, batch.tokens_bt.shape[1]
        assert batch.tokens_bt.shape[0] % devices == 0
        assert per_device == 1 or per_device * length <= tokens_per_batch
        for device, (wanted, targets, ids) in enumerate(
            zip(*(np.split(x, devices) for x in (batch.wanted_s, batch.targets_s, batch.step_ids_s)), strict=True)
        ):
            real = ids >= 0
            tokens, positions, segments = (
                x[device * per_device : (device + 1) * per_device].ravel()
                for x in (batch.tokens_bt, batch.positions_bt, batch.segment_ids_bt)
            )
            places = np.repeat(np.arange(per_device), length)
            assert (segments[wanted[real]] > 0).all()
            for place in range(per_device):
                row = device * per_device + place
                own = places == place
                prefix = prefixes[batch.prefix_b[row]]
                assert batch.prefix_lengths_b[row] == (prefix if segments[own].any() else 0)
                for segment in range(1, segments[own].max() + 1):
                    at = np.flatnonzero(own & (segments == segment))
                    np.testing.assert_array_equal(positions[at], prefix + np.arange(len(at)))
                    scored = real & np.isin(wanted, at)
                    assert wanted[scored][-1] == at[-1]
                    text = (*tokens[at], targets[scored][-1])
                    assert tuple(targets[scored]) == text[len(text) - scored.sum() :]
                    found.append((int(batch.prefix_b[row]), text, tuple(ids[scored])))
    expected = [
        (prompt, tuple(window.tokens), tuple(window.step_ids))
        for prompt, windows in enumerate(by_prompt)
        for window in windows
    ]
    assert sorted(found) == sorted(expected)


def test_rows_are_as_long_as_their_longest_window_needs_and_nearly_full() -> None:
    rng = np.random.default_rng()
    windows = [WindowText(np.zeros(n + 1, np.int64), 1, np.zeros(1, np.int64)) for n in rng.integers(30, 250, 400)]
    rows = pack_rows(windows, 0, 5)
    assert {row.length for row in rows} == {SHORTEST_ROW}
    assert sum(window.length for window in windows) > 0.95 * SHORTEST_ROW * len(rows)
    (long,) = pack_rows([WindowText(np.zeros(1_000, np.int64), 1, np.zeros(1, np.int64))], 0, 5)
    assert long.length == 1_024
