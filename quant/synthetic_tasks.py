"""Made-up rows for every benchmark in its dataset's own columns: to rehearse an evaluation offline, never to judge a model.

Right answers repeat a word of the question, so that a model which copies does better than chance.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("river", "stone", "lamp", "garden", "window", "bread", "paper", "cloud", "silver", "forest", "music", "bridge")
ROWS, SHOTS = 24, 12
Row = dict[str, Any]


def _labelled(draw: random.Random, count: int, question: str) -> Row:
    words = draw.sample(WORDS, count)
    gold = draw.randrange(count)
    letters = [chr(ord("A") + i) for i in range(count)]
    text = f"Which of these words is {words[gold]}?"
    return {question: text, "choices": {"text": words, "label": letters}, "answerKey": letters[gold]}


def _hellaswag(draw: random.Random) -> Row:
    words, gold = draw.sample(WORDS, 4), draw.randrange(4)
    endings = [f"looks at the {word} again. [substeps]" for word in words]
    context = {"ctx_a": f"A person holds the {words[gold]}. [title]", "ctx_b": "then the person"}
    return {"activity_label": "Looking", **context, "endings": endings, "label": str(gold)}


def _mmlu(draw: random.Random) -> Row:
    words, gold = draw.sample(WORDS, 4), draw.randrange(4)
    question = f"Which of these words is {words[gold]}?"
    return {"subject": "common_words", "question": question, "choices": words, "answer": gold}


def _piqa(draw: random.Random) -> Row:
    words, gold = draw.sample(WORDS, 2), draw.randrange(2)
    return {"goal": f"Find the {words[gold]}.", "sol1": f"Find {words[0]}.", "sol2": f"Find {words[1]}.", "label": gold}


def _siqa(draw: random.Random) -> Row:
    words, gold = draw.sample(WORDS, 3), draw.randrange(3)
    answers = dict(zip(("answerA", "answerB", "answerC"), words, strict=True))
    return {
        "context": f"Kim took the {words[gold]}.",
        "question": "What did Kim take?",
        **answers,
        "label": str(gold + 1),
    }


def _winogrande(draw: random.Random) -> Row:
    words, gold = draw.sample(WORDS, 2), draw.randrange(2)
    sentence = f"The {words[gold]} is here, so take the _ now."
    return {"sentence": sentence, "option1": words[0], "option2": words[1], "answer": str(gold + 1)}


def _gsm8k(draw: random.Random) -> Row:
    first, second = draw.randrange(2, 20), draw.randrange(2, 20)
    question = f"Kim has {first} stones and finds {second} more. How many are there?"
    return {"question": question, "answer": f"{first} + {second} = {first + second}\n#### {first + second}"}


def _triviaqa(draw: random.Random) -> Row:
    word = draw.choice(WORDS)
    return {"question": f"Which word is {word}?", "answer": {"value": word, "aliases": [word, word.upper()]}}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    "arc_easy": lambda draw: _labelled(draw, 4, "question"),
    "arc_challenge": lambda draw: _labelled(draw, 4, "question"),
    "commonsense_qa": lambda draw: _labelled(draw, 5, "question"),
    "gsm8k": _gsm8k,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "openbookqa": lambda draw: _labelled(draw, 4, "question_stem"),
    "piqa": _piqa,
    "siqa": _siqa,
    "triviaqa": _triviaqa,
    "winogrande": _winogrande,
}


def synthetic_rows(task: str, shots: bool = False) -> list[Row]:
    """ROWS rows of a task, or SHOTS others to show; the same on every machine."""
    draw = random.Random(zlib.crc32(f"{task} {shots}".encode()))
    return [MAKERS[task](draw) for _ in range(SHOTS if shots else ROWS)]


def write_suite(folder: Path) -> Path:
    """Write every task as NAME.jsonl (and NAME.shots.jsonl) into `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in MAKERS:
        for name, shots in ((f"{task}.jsonl", False), (f"{task}.shots.jsonl", True)):
            lines = [json.dumps(row) for row in synthetic_rows(task, shots)]
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
