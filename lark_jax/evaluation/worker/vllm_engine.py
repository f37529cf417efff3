"""Samples from vLLM, on GPU, TPU or CPU."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from worker_records import Generation, Job, Request, Sample

CPU_KV_CACHE_BYTES = 1 << 30  # unless two sequences need more
CPU_SEQUENCES = 256  # decoded together
CPU_TOKENS_PER_STEP = 4_096  # or one sequence of maximal length
WITHOUT_LIBTPU = Path(__file__).with_name("without_libtpu")


def generate(request: Request, pending: Sequence[Job]) -> Iterator[Generation]:
    """Yields jobs as they finish. All are queued at once, so the engine keeps its batch full to the end."""
    if request.tensor_parallel == 1:  # in process: starts faster, and schedules the same way every time
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    hide_libtpu_without_tpu()
    from vllm import LLM
    from vllm.platforms import current_platform

    engine = LLM(
        model=request.model,
        dtype=request.dtype,
        tensor_parallel_size=request.tensor_parallel,
        max_model_len=request.max_model_len,
        generation_config="vllm",  # sampling follows the request, not a file in the model folder
        enable_prefix_caching=False,  # a sample must not depend on which prompts ran before
        disable_log_stats=True,
        **(_cpu_arguments(request) if current_platform.is_cpu() else {}),
    ).llm_engine
    for number, job in enumerate(pending):
        engine.add_request(str(number), {"prompt_token_ids": list(job.prompt.tokens)}, _sampling(request, job))
    while engine.has_unfinished_requests():
        output: Any
        for output in engine.step():
            if output.finished:
                completions: list[Any] = sorted(output.outputs, key=lambda completion: completion.index)
                samples = tuple(Sample(c.text, str(c.finish_reason), len(c.token_ids)) for c in completions)
                yield Generation(pending[int(output.request_id)], samples)


def hide_libtpu_without_tpu(devices: Path = Path("/dev")) -> None:
    """vLLM takes an installed libtpu for a TPU, but it may be installed only to compile for TPUs ahead of time.

    Hides it from this process and its child processes: vLLM inspects a model's class in a process of its own.

    Args:
      devices: the system's folder of device files; a TPU appears as `accel*` or in `vfio/`, depending on its driver.
    """
    if not [*devices.glob("accel*"), *devices.glob("vfio/[0-9]*")]:
        sys.modules["libtpu"] = None  # type: ignore[assignment]  # how Python spells "cannot be imported"
        search_path = [str(WITHOUT_LIBTPU), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(search_path)


def _sampling(request: Request, job: Job) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    schema = request.answer_schema
    return SamplingParams(
        n=request.samples,
        seed=request.first_seed(job),
        temperature=request.temperature,
        top_p=request.top_p,
        repetition_penalty=request.repetition_penalty,
        max_tokens=request.budget(job.prompt),
        stop_token_ids=list(request.stop_ids),
        ignore_eos=True,  # every token that ends a turn is among stop_ids
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
    )


def _cpu_arguments(request: Request) -> dict[str, Any]:
    """On CPU the KV cache needs an explicit size, and compiling costs more than it gains."""
    config = json.loads((Path(request.model) / "config.json").read_text(encoding="utf-8"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    token_bytes = 2 * config["num_hidden_layers"] * kv_heads * head_dim * 4
    sequence_bytes = token_bytes * (request.max_model_len + 256)  # whole blocks, and the one that vLLM reserves
    cache_bytes = max(2 * sequence_bytes, min(CPU_KV_CACHE_BYTES, CPU_SEQUENCES * sequence_bytes))
    return {
        "kv_cache_memory_bytes": cache_bytes,
        "enforce_eager": True,
        "max_num_seqs": CPU_SEQUENCES,
        # A prompt split over two steps makes vLLM rewind the seeded generator, which torch's CPU generator cannot.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(request.max_model_len, CPU_TOKENS_PER_STEP),
    }
