"""What is asked of every judge beside the messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SEED_DIGITS = 8  # hexadecimal, of a question's key: 32 bits, all that torch's CPU generator reads


@dataclass(frozen=True)
class Decoding:
    max_tokens: int  # of an answer
    temperature: float  # 0: greedy
    structured_output: str  # "schema", "json_object" or "none"
    schema: Mapping[str, Any]  # of a useful answer
    template_arguments: Mapping[str, Any]  # for the judge's chat template

    def as_json(self) -> dict[str, Any]:
        """What answers depend on; the schema only where the engine sees it."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "structured_output": self.structured_output,
            "schema": self.schema if self.structured_output == "schema" else None,
            "template_arguments": self.template_arguments,
        }


def seed_of(key: str) -> int:
    """A question's seed: the same whenever, and beside whatever else, it is asked."""
    return int(key[:SEED_DIGITS], 16)
