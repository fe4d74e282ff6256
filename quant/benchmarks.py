"""Benchmarks through lm-evaluation-harness, on a live model: whatever quantization surrounds the call is measured with it."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from quant.benchmark_data import TaskData
from quant.benchmark_tasks import STOP, Benchmark, is_right
from quant.quiet_bars import bars_on_terminals_only

SHOT_SEED = 1234


@dataclass(frozen=True)
class Score:
    """Share of right answers, its standard error, and the number of documents; `note` says why there is none."""

    accuracy: float | None
    stderr: float | None
    documents: int
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return asdict(self)


def require_harness() -> None:
    """Raise UserError when lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("benchmarks need lm_eval, which is not installed; pip install 'mesokurt[eval]'")


def _task_config(data: TaskData) -> dict[str, Any]:
    """The harness's definition of a task whose documents are there already."""
    from datasets import Dataset

    task = data.task
    splits = {"test": Dataset.from_list(list(data.documents))}
    if data.shots:
        splits["shots"] = Dataset.from_list(list(data.shots))
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: splits,
        "test_split": "test",
        "fewshot_split": "shots" if data.shots else None,
        "num_fewshot": task.shots,
        "doc_to_text": lambda document: document["query"],
        "target_delimiter": " ",
        "fewshot_delimiter": "\n\n",
        "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
    }
    if task.new_tokens is None:
        cloze = {"doc_to_choice": lambda d: d["choices"], "doc_to_target": lambda d: d["gold"]}
        return {**config, "output_type": "multiple_choice", **cloze}
    generation = {"until": list(STOP), "do_sample": False, "max_gen_toks": task.new_tokens}
    return {
        **config,
        "output_type": "generate_until",
        "generation_kwargs": generation,
        "doc_to_target": lambda document: document["target"],
        "process_results": lambda document, found: {task.metric: is_right(task, found[0], document["answers"])},
    }


def context_of(model: PreTrainedModel) -> int:
    """How many tokens the model takes, at most 2048 as in the paper."""
    return min(int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048)), 2048)


def obstacle(task: Benchmark, model: PreTrainedModel) -> str:
    """Why the model cannot take a task, or nothing: generated text must leave room for the prompt."""
    context = context_of(model)
    if task.new_tokens is not None and task.new_tokens >= context:
        return f"skipped: generates {task.new_tokens} tokens, the model's context is {context}"
    return ""


@contextmanager
def _weights_left_alone(model: PreTrainedModel) -> Iterator[None]:
    """Within it nobody can tie the model's tables: the harness does when it takes a model, which would undo a rotation of both."""
    instance = vars(model)
    before = instance.get("tie_weights")
    instance["tie_weights"] = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del instance["tie_weights"]
        if before is not None:
            instance["tie_weights"] = before


def run_benchmarks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[TaskData], batch_size: int = 8
) -> dict[str, Score]:
    """Scores by task name. A prompt that is longer than the context loses its beginning, as in the harness.

    Raises:
        UserError: lm-evaluation-harness is not installed.
    """
    scores = {
        data.task.name: Score(None, None, len(data.documents), obstacle(data.task, model))
        for data in tasks
        if obstacle(data.task, model)
    }
    wanted = [data for data in tasks if data.task.name not in scores]
    if not wanted:
        return scores
    require_harness()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    harness = {}
    for data in wanted:
        harness[data.task.name] = ConfigurableTask(config=_task_config(data))
        harness[data.task.name].set_fewshot_seed(SHOT_SEED)
    place = {"max_length": context_of(model), "device": str(model.device), "backend": "causal"}
    with bars_on_terminals_only():
        with _weights_left_alone(model):
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **place)
        found = evaluate(lm, {"tasks": harness, "groups": {}, "group_map": {}}, log_samples=False)["results"]
    for data in wanted:
        entry, metric = found[data.task.name], data.task.metric
        stderr = entry.get(f"{metric}_stderr,none")
        known = isinstance(stderr, float) and math.isfinite(stderr)
        scores[data.task.name] = Score(float(entry[f"{metric},none"]), stderr if known else None, len(data.documents))
    return scores
