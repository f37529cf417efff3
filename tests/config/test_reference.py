"""docs/config.md is generated from the field declarations, and every field has a meaning."""

from pathlib import Path

from lark_jax.config.reference import as_markdown, section_entries

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_markdown(), "run: make config-reference"


def test_every_field_has_a_meaning_that_is_a_sentence() -> None:
    fields = [field for section in section_entries() for field in section.fields]
    assert len({field.name for field in fields}) == len(fields) > 100
    for field in fields:
        assert field.meaning[0].isupper(), field.name
        assert field.meaning.endswith("."), field.name


def test_rows_show_type_default_unit_allowed_values_and_source() -> None:
    page = as_markdown()
    assert "| `workdir` | `str` | required |  | Folder for everything that the stages write. |" in page
    assert (
        "| `finetune.batch_size` | `int` | `64` | trajectories | Batch size of an optimizer step, over all devices. "
        "Allowed: an integer >= 1. Paper: C.3: 8 GPUs x 1 x accumulation 8. |"
    ) in page
    assert "| `evaluate.engines` | `int or None` | `None` | engines |" in page
