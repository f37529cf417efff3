"""The table of statistics, and what follows from it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lark_jax.ops.token_statistics import TokenStatistics
from lark_jax.scoring.statistics import MAX_RANK, STATISTICS, markdown_table, trajectory_means
from lark_jax.scoring.table import SCHEMA

METHODS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_every_statistic_has_a_column_of_its_own_and_a_field_that_exists() -> None:
    names = [statistic.name for statistic in STATISTICS]
    assert len(set(names)) == len(names)
    assert [name for name in SCHEMA.names if name in names] == names
    assert {statistic.field for statistic in STATISTICS} == set(TokenStatistics._fields), "a field that nobody reads"


def test_means_are_over_the_masked_in_tokens_of_each_row_and_read_no_others() -> None:
    rng = np.random.default_rng()
    mask_bt = jnp.asarray([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4])
    fields = [rng.uniform(1, 2 * MAX_RANK, (3, 4)).astype(np.float32) for _ in TokenStatistics._fields]
    for field in fields:
        field[0, 3] = np.nan
    statistics = TokenStatistics(*fields)
    means = trajectory_means(statistics, mask_bt)
    for statistic in STATISTICS:
        values_bt = getattr(statistics, statistic.field)
        if statistic.name == "mean_clipped_rank":
            values_bt = np.minimum(values_bt, MAX_RANK)
        expected = [values_bt[0, 1:3].mean(), values_bt[1].mean(), np.nan]
        np.testing.assert_allclose(means[statistic.name], expected, rtol=1e-6, err_msg=statistic.name)


def test_the_documentation_shows_the_table_as_it_is() -> None:
    _, _, after = METHODS_PAGE.read_text(encoding="utf-8").partition("lark_jax.scoring.statistics.markdown_table -->\n")
    shown, _, _ = after.partition("\n<!-- end of statistics -->")
    assert shown == markdown_table(), "put the output of markdown_table() between the two comments of docs/methods.md"
