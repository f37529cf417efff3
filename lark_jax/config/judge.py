"""The configuration section `score.judge`."""

import dataclasses
import json
import math
from typing import Any

from lark_jax.config.checks import require, require_one_of, require_url, require_variable


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Who answers for the metric "judge", and how it is asked."""

    engine: str = "openai"  # a server with chat completions; or "vllm": a folder, in evaluate.python
    model: str | None = None  # its name on the server, or its folder
    server: str | None = None  # base URL with "/v1"
    key_variable: str | None = None  # environment variable that holds the key, where the server wants one
    prompt_file: str | None = None  # TOML, in place of judging/rubric.toml
    max_tokens: int = 1_024  # of an answer
    temperature: float = 0.0
    structured_output: str = "schema"  # hold the judge to the answer's JSON schema; or "json_object", or "none"
    template_arguments: str = "{}"  # JSON object for its chat template, such as {"enable_thinking": false}
    attempts: int = 3  # answers asked for until one is of use
    concurrency: int = 32  # requests under way
    requests_per_minute: float | None = None  # None: as many as concurrency allows
    timeout: float = 600.0  # seconds for one request
    retries: int = 5  # of a request, after failures that may pass
    tensor_parallel: int = 1  # GPUs; engine "vllm"

    def __post_init__(self) -> None:
        require_one_of("score.judge.engine", self.engine, ("openai", "vllm"))
        require_one_of("score.judge.structured_output", self.structured_output, ("schema", "json_object", "none"))
        for name in ("max_tokens", "attempts", "concurrency", "tensor_parallel"):
            require(getattr(self, name) >= 1, f"score.judge.{name}", getattr(self, name), "an integer >= 1")
        require(self.retries >= 0, "score.judge.retries", self.retries, "an integer >= 0")
        require(0 <= self.temperature < math.inf, "score.judge.temperature", self.temperature, "a number >= 0")
        for name in ("timeout", "requests_per_minute"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"score.judge.{name}", value, "a positive number")
        require_variable("score.judge.key_variable", self.key_variable)
        arguments = _parsed_json(self.template_arguments)
        require(isinstance(arguments, dict), "score.judge.template_arguments", self.template_arguments, "a JSON object")

    def require_usable(self) -> None:
        """Called where the judge is asked for."""
        require(bool(self.model), "score.judge.model", self.model, "a model's name or folder")
        if self.engine == "openai":
            require_url("score.judge.server", self.server)


def _parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
