"""The ten benchmarks of Outlier-Safe Pre-Training: prompts, answers and scoring, from rows in each dataset's own columns.

The paper's protocol (lighteval 0.9.2): multiple choice in cloze form (the answer *texts* are scored, never letters), log-likelihood
divided by the answer's characters without the space before it; GSM8K and TriviaQA are generated. ARC is two tasks and one score.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError

Row = Mapping[str, Any]
Document = dict[str, Any]
"""Cloze: `query`, `choices`, `gold`. Generated: `query`, `target` (shown in shots) and `answers` (any of which is right)."""


@dataclass(frozen=True)
class Benchmark:
    """One task: where its rows are on the Hub, how a row becomes a document, how many shots, how many new tokens (None: cloze)."""

    name: str
    score: str
    repository: str
    subset: str
    split: str
    document: Callable[[Row], Document]
    shots: int = 0
    new_tokens: int | None = None
    normalise: Callable[[str], str] = str.strip
    revision: int = 1
    """Counts changes of this definition, so that old results are not taken for new ones."""

    @property
    def metric(self) -> str:
        """The harness's name of what is reported."""
        return "acc_norm" if self.new_tokens is None else "exact_match"


def _cloze(query: str, choices: Iterable[str], gold: int) -> Document:
    """The space between query and choice belongs to the harness."""
    options = [str(choice).strip() for choice in choices]
    if not 0 <= gold < len(options) or not all(options):
        raise ValueError(f"answer {gold} of {len(options)} choices, or an empty choice")
    return {"query": query.rstrip(" "), "choices": options, "gold": gold}


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _labelled(row: Row) -> tuple[list[str], int]:
    """Choices and the answer's place of ARC, CommonsenseQA and OpenBookQA."""
    choices = row["choices"]
    return list(choices["text"]), list(choices["label"]).index(str(row["answerKey"]).strip())


def arc(row: Row) -> Document:
    """ARC: question, choices {text, label}, answerKey."""
    return _cloze(_question(row["question"]), *_labelled(row))


def commonsense_qa(row: Row) -> Document:
    """CommonsenseQA: question, choices {text, label}, answerKey; the bare question is the prompt."""
    return _cloze(row["question"], *_labelled(row))


def openbookqa(row: Row) -> Document:
    """OpenBookQA: question_stem, choices {text, label}, answerKey; the bare stem is the prompt."""
    return _cloze(row["question_stem"], *_labelled(row))


def _without_wikihow_marks(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(row: Row) -> Document:
    """HellaSwag: activity_label, ctx_a, ctx_b, endings, label."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    endings = [_without_wikihow_marks(ending) for ending in row["endings"]]
    return _cloze(_without_wikihow_marks(context), endings, int(row["label"]))


def mmlu(row: Row) -> Document:
    """MMLU: subject, question, choices, answer (an index)."""
    topic = str(row["subject"]).replace("_", " ")
    prompt = f"The following are questions about {topic}.\n{_question(row['question'])}"
    return _cloze(prompt, row["choices"], int(row["answer"]))


def piqa(row: Row) -> Document:
    """PIQA: goal, sol1, sol2, label."""
    return _cloze(_question(row["goal"]), (row["sol1"], row["sol2"]), int(row["label"]))


def siqa(row: Row) -> Document:
    """Social IQa: context, question, answerA to answerC, label from 1."""
    answers = (row["answerA"], row["answerB"], row["answerC"])
    return _cloze(f"{row['context']} {row['question']}", answers, int(row["label"]) - 1)


def winogrande(row: Row) -> Document:
    """WinoGrande: sentence with one `_`, option1, option2, answer from 1; a choice is the option and the rest of the sentence."""
    before, blank, after = str(row["sentence"]).partition("_")
    if not blank:
        raise ValueError("the sentence has no _ to fill")
    choices = [f"{option} {after.strip()}" for option in (row["option1"], row["option2"])]
    return _cloze(before, choices, int(row["answer"]) - 1)


def gsm8k(row: Row) -> Document:
    """GSM8K: question, answer that ends in `#### number`."""
    return {"query": _question(row["question"]), "target": row["answer"], "answers": [row["answer"]]}


def triviaqa(row: Row) -> Document:
    """TriviaQA (rc.nocontext): question, answer {value, aliases}."""
    answers = [str(alias) for alias in row["answer"]["aliases"]] or [str(row["answer"]["value"])]
    return {"query": _question(row["question"]), "target": answers[0], "answers": answers}


def final_number(text: str) -> str:
    """What follows `####`, without thousands separators; `[invalid]` when nothing does."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found.group(1).replace(",", "") if found else "[invalid]"


def plain_words(text: str) -> str:
    """Lower case without punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def is_right(benchmark: Benchmark, generated: str, answers: Iterable[str]) -> bool:
    """Quasi exact match: equal after normalisation to any answer; text without a number never is."""
    found = benchmark.normalise(generated)
    return found != "[invalid]" and found in {benchmark.normalise(answer) for answer in answers}


STOP = ("Question",)
"""Where generated text ends: the beginning of the next shot."""

BENCHMARKS: Mapping[str, Benchmark] = {
    task.name: task
    for task in (
        Benchmark("arc_easy", "ARC", "allenai/ai2_arc", "ARC-Easy", "test", arc),
        Benchmark("arc_challenge", "ARC", "allenai/ai2_arc", "ARC-Challenge", "test", arc),
        Benchmark("commonsense_qa", "CSQA", "tau/commonsense_qa", "default", "validation", commonsense_qa),
        Benchmark("gsm8k", "GSM8K", "openai/gsm8k", "main", "test", gsm8k, 8, 256, final_number),
        Benchmark("hellaswag", "HellaSwag", "Rowan/hellaswag", "default", "validation", hellaswag),
        Benchmark("mmlu", "MMLU", "cais/mmlu", "all", "test", mmlu),
        Benchmark("openbookqa", "OBQA", "allenai/openbookqa", "main", "validation", openbookqa),
        Benchmark("piqa", "PIQA", "ybisk/piqa", "plain_text", "validation", piqa),
        Benchmark("siqa", "SIQA", "lighteval/siqa", "default", "validation", siqa),
        Benchmark("triviaqa", "TriviaQA", "mandarjoshi/trivia_qa", "rc.nocontext", "validation", triviaqa, 5, 20, plain_words),
        Benchmark("winogrande", "WinoGrande", "allenai/winogrande", "winogrande_xl", "validation", winogrande),
    )
}  # fmt: skip


def benchmarks_named(names: Iterable[str]) -> list[Benchmark]:
    """The tasks of these names, in the order of the table; `all` means every one.

    Raises:
        UserError: a name that is not known (near ones are listed).
    """
    wanted = list(names)
    for name in wanted:
        if name != "all" and name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=3, cutoff=0.5) or list(BENCHMARKS)
            raise UserError(f"unknown task {name!r}; known: all, {', '.join(near)}", exit_code=2)
    return [task for task in BENCHMARKS.values() if "all" in wanted or task.name in wanted]
