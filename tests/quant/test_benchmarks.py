"""Benchmarks: the harness scores as twenty independent lines do, prompts are the paper's, bad data is one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from configs.errors import UserError
from modeling.auto import load_whole
from quant.benchmark_data import SYNTHETIC, TaskData, load_task
from quant.benchmark_tasks import BENCHMARKS, benchmarks_named, final_number, is_right, plain_words
from quant.benchmarks import Score, run_benchmarks
from quant.bits import Bits
from quant.fake_quant import fake_quantized
from quant.synthetic_tasks import ROWS, synthetic_rows, write_suite
from tests.modeling.small import roughen, small_model
from tests.training.data.corpora import VOCAB, small_tokenizer
from training.data.tokenizer import save_tokenizer

CLOZE = [task.name for task in BENCHMARKS.values() if task.new_tokens is None]
Live = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """A random decoder of this project with its tokenizer, context 512, heads of 8."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 512}
    roughen(small_model("sdpa", vocab_size=VOCAB, **shape)).save_pretrained(folder)
    save_tokenizer(small_tokenizer(), folder)
    return load_whole(folder), AutoTokenizer.from_pretrained(folder)


def tasks(*names: str) -> list[TaskData]:
    return [load_task(task, SYNTHETIC) for task in benchmarks_named(names)]


def cloze_accuracy(live: Live, data: TaskData) -> tuple[float, float]:
    """The reference: log-likelihood of each answer's tokens, by one forward each, over the answer's characters."""
    model, tokenizer = live
    right = []
    for document in data.documents:
        scores = []
        for choice in document["choices"]:
            context = tokenizer.encode(document["query"])
            whole = tokenizer.encode(f"{document['query']} {choice}")
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            nats = sum(float(logits[place - 1, whole[place]]) for place in range(len(context), len(whole)))
            scores.append(nats / len(choice))
        right.append(scores.index(max(scores)) == document["gold"])
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1))


def test_every_cloze_task_scores_as_the_reference_does(live: Live) -> None:
    data = tasks(*CLOZE)
    found = run_benchmarks(*live, data)
    assert list(found) == CLOZE
    for one in data:
        mean, stderr = cloze_accuracy(live, one)
        assert found[one.task.name].accuracy == mean
        assert found[one.task.name].stderr == pytest.approx(stderr)
        assert found[one.task.name].documents == ROWS
    assert len({score.accuracy for score in found.values()}) > 3  # scores, not a constant


def test_quantization_around_the_call_is_measured_with_it(live: Live) -> None:
    """2 bits everywhere: the reference under the same quantization agrees, and full precision does not."""
    (data,) = tasks("hellaswag")
    full = run_benchmarks(*live, [data])
    with fake_quantized(live[0], Bits(2, 2, 2)):
        quantized = run_benchmarks(*live, [data], batch_size=5)
        wanted = cloze_accuracy(live, data)[0]
    assert quantized["hellaswag"].accuracy == wanted
    assert quantized != full


def test_generated_answers_are_the_greedy_continuation_of_five_shots(live: Live) -> None:
    """A bias towards one token makes the random model answer one word; documents whose answer that is are right."""
    model, tokenizer = live
    (data,) = tasks("triviaqa")
    echo = "aa"
    documents = [
        {**d, "answers": [echo * n for n in range(1, 60)] if i % 3 == 0 else ["no"]}
        for i, d in enumerate(data.documents)
    ]
    token = tokenizer.encode(f"a {echo}")[-1]

    def always(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1])

    handle = model.get_output_embeddings().register_forward_hook(always)
    try:
        found = run_benchmarks(model, tokenizer, [TaskData(data.task, documents, data.shots, data.sha256)])
    finally:
        handle.remove()
    text = str(tokenizer.decode([token] * 20))
    wanted = sum(is_right(data.task, text, d["answers"]) for d in documents)
    assert wanted == 8
    assert found["triviaqa"].accuracy == wanted / ROWS


def test_a_context_too_short_for_generated_text_is_a_note(live: Live) -> None:
    (data,) = tasks("gsm8k")
    model, tokenizer = live
    before = model.config.max_position_embeddings
    model.config.max_position_embeddings = 256
    try:
        found = run_benchmarks(model, tokenizer, [data])
    finally:
        model.config.max_position_embeddings = before
    assert found == {"gsm8k": Score(None, None, ROWS, "skipped: generates 256 tokens, the model's context is 256")}


PROMPTS: dict[str, tuple[dict[str, Any], str, list[str], int]] = {
    "arc_easy": (
        {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Why?\nAnswer:", ["so", "no"], 1,
    ),
    "commonsense_qa": (
        {"question": "Where is it?", "choices": {"text": ["here", "there"], "label": ["A", "B"]}, "answerKey": "A"},
        "Where is it?", ["here", "there"], 0,
    ),
    "openbookqa": (
        {"question_stem": "Ice is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "A "},
        "Ice is", ["cold", "hot"], 0,
    ),
    "hellaswag": (
        {"activity_label": "Baking", "ctx_a": "One mixes [header] flour [title] Then", "ctx_b": "they", "label": "1",
         "endings": ["sleep.", "bake  it. [step]"]},
        "Baking: One mixes flour. Then They", ["sleep.", "bake it."], 1,
    ),
    "mmlu": (
        {"subject": "high_school_physics", "question": "c?", "choices": ["fast", "slow"], "answer": 0},
        "The following are questions about high school physics.\nQuestion: c?\nAnswer:", ["fast", "slow"], 0,
    ),
    "piqa": ({"goal": "Cut", "sol1": "knife", "sol2": "spoon", "label": 0}, "Question: Cut\nAnswer:", ["knife", "spoon"], 0),
    "siqa": (
        {"context": "Kim ran.", "question": "Why?", "answerA": "late", "answerB": "fun", "answerC": "fear", "label": "3"},
        "Kim ran. Why?", ["late", "fun", "fear"], 2,
    ),
    "winogrande": (
        {"sentence": "It hit the _ because it moved.", "option1": "ball", "option2": "wall", "answer": "1"},
        "It hit the", ["ball because it moved.", "wall because it moved."], 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_choices_are_the_papers(name: str) -> None:
    row, query, choices, gold = PROMPTS[name]
    assert BENCHMARKS[name].document(row) == {"query": query, "choices": choices, "gold": gold}


def test_quasi_exact_match_looks_at_numbers_and_at_plain_words() -> None:
    gsm8k, trivia = BENCHMARKS["gsm8k"], BENCHMARKS["triviaqa"]
    assert final_number("1 + 2 = 3\n#### 1,003\n") == "1003"
    assert is_right(gsm8k, " so #### 1,003", ["#### 1003"])
    assert not is_right(gsm8k, "1003", ["1003"])  # no #### on either side is no answer
    assert plain_words(" The  Beatles!\n") == "the beatles"
    assert is_right(trivia, " Lennon.\n\n", ["Paul", "LENNON"])
    assert not is_right(trivia, "Lennon and Paul", ["Lennon"])


def test_eleven_tasks_make_ten_scores() -> None:
    assert len(BENCHMARKS) == 11
    assert len({task.score for task in BENCHMARKS.values()}) == 10
    assert {task.name: task.shots for task in BENCHMARKS.values() if task.shots} == {"gsm8k": 8, "triviaqa": 5}


def test_local_files_are_read_in_the_datasets_own_columns(tmp_path: Path) -> None:
    write_suite(tmp_path)
    for task in BENCHMARKS.values():
        here, made = load_task(task, str(tmp_path)), load_task(task, SYNTHETIC)
        assert here.documents == made.documents
        assert here.sha256 == made.sha256
        assert load_task(task, SYNTHETIC, limit=3).sha256 != made.sha256
        assert len(load_task(task, SYNTHETIC, limit=3).documents) == 3


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "piqa.jsonl").unlink(), "task piqa: .*piqa.jsonl is missing; put rows of ybisk/piqa"),
        (lambda f: (f / "piqa.jsonl").write_text("{\n"), "task piqa: .*piqa.jsonl line 1 is no JSON"),
        (lambda f: (f / "piqa.jsonl").write_text("[1]\n"), "task piqa: row 1 does not fit"),
        (lambda f: (f / "piqa.jsonl").write_text('{"goal": "x"}\n'), "task piqa: row 1 has no column 'sol1'"),
        (lambda f: (f / "piqa.jsonl").write_text("\n"), "task piqa: no rows in"),
        (lambda f: (f / "piqa.jsonl").write_bytes(b"\xff\xfe"), "task piqa: .* cannot be read as UTF-8"),
        (
            lambda f: (f / "piqa.jsonl").write_text(json.dumps(synthetic_rows("piqa")[0] | {"label": -1}) + "\n"),
            "task piqa: row 1 does not fit the dataset's columns .answer -1 of 2 choices",
        ),
    ],
)
def test_bad_task_files_are_one_line_that_names_the_task(damage: Any, told: str, tmp_path: Path) -> None:
    write_suite(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        load_task(BENCHMARKS["piqa"], str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_dataset_that_is_not_here_names_the_task_and_the_way_out() -> None:
    with pytest.raises(
        UserError, match=r"task siqa: dataset lighteval/siqa .* give --task-data FOLDER with siqa.jsonl"
    ):
        load_task(BENCHMARKS["siqa"])


def test_too_few_shots_and_unknown_tasks_are_refused(tmp_path: Path) -> None:
    write_suite(tmp_path)
    (tmp_path / "gsm8k.shots.jsonl").write_text(json.dumps(synthetic_rows("gsm8k")[0]) + "\n")
    with pytest.raises(UserError, match=r"task gsm8k: 1 rows for shots in .*, 8 are needed"):
        load_task(BENCHMARKS["gsm8k"], str(tmp_path))
    with pytest.raises(UserError, match="unknown task 'helaswag'; known: all, hellaswag"):
        benchmarks_named(["helaswag"])
