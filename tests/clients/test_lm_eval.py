"""lm-evaluation-harness through the API scores what the engine scores without it.

Breaks for: whoever publishes a benchmark of a model that convserve serves.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from convserve.engine import LLM, SamplingParams

if TYPE_CHECKING:
    from running import Served

TASKS = Path(__file__).parent / "tasks"
DOCS = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]


class Evaluated(NamedTuple):
    """What a run left: the task's score, and each document's record in order."""

    score: float
    samples: list[dict[str, Any]]


Evaluate = Callable[..., Evaluated]


@pytest.fixture
def evaluate(
    server: Served, tool: Callable[..., str], run_tool: Callable[..., str], tmp_path: Path
) -> Evaluate:
    """evaluate(model kind, task, metric, path of the API, further model arguments)"""

    def run(kind: str, task: str, metric: str, route: str, *words: str, **model: Any) -> Evaluated:
        model = {"base_url": server.url + route, "model": server.model, "max_retries": 1, **model}
        told = ",".join(f"{key}={value}" for key, value in model.items())
        run_tool(
            [
                *(tool("lm_eval"), "run", "--model", kind, "--model_args", told),
                *("--tasks", task, "--include_path", ".", "--output_path", str(tmp_path)),
                *("--log_samples", *words),
            ],
            cwd=TASKS,
            HF_HUB_OFFLINE="1",
            HF_DATASETS_CACHE=str(tmp_path / "datasets"),
        )
        [results] = tmp_path.rglob("results_*.json")
        [samples] = tmp_path.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        return Evaluated(
            json.loads(results.read_text())["results"][task][f"{metric},none"],
            sorted(rows, key=lambda row: row["doc_id"]),
        )

    return run


@pytest.mark.parametrize("tokenized", [True, False])
def test_likelihoods_are_the_engines(
    evaluate: Evaluate, offline: LLM, server: Served, tokenized: bool
) -> None:
    """Tokenized requests: batches of token-id prompts with echo and one logprob."""
    done = evaluate(
        "local-completions",
        "capital_choice",
        "acc",
        "/v1/completions",
        *("--batch_size", "4" if tokenized else "1"),
        tokenizer=server.folder,
        tokenizer_backend="huggingface",
        tokenized_requests=tokenized,
        num_concurrent=2,
    )
    right = 0
    for doc, row in zip(DOCS, done.samples, strict=True):
        context = f"The capital of {doc['country']} is"
        begin = len(offline.tokenizer.encode(context))
        whole = [offline.tokenizer.encode(f"{context} {choice}") for choice in doc["choices"]]
        scores = [
            sum(score for score in scored[begin:] if score is not None)
            for scored in offline.score(whole)
        ]
        told = [float(answer[0][0]) for answer in row["resps"]]
        assert told == pytest.approx(scores, abs=1e-3)
        right += scores.index(max(scores)) == doc["answer"]
    assert done.score == pytest.approx(right / len(DOCS))
    assert right > len(DOCS) / 2


def test_chat_answers_are_the_engines(evaluate: Evaluate, offline: LLM, server: Served) -> None:
    done = evaluate(
        "local-chat-completions",
        "capital_chat",
        "exact_match",
        "/v1/chat/completions",
        "--apply_chat_template",
        num_concurrent=2,
    )
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(server.folder)
    params = SamplingParams(temperature=0, max_tokens=12)
    right = 0
    for doc, row in zip(DOCS, done.samples, strict=True):
        ask = f"What is the capital of {doc['country']}? Answer with its name alone."
        prompt = template.apply_chat_template(
            [{"role": "user", "content": ask}],
            add_generation_prompt=True,
            return_dict=False,
        )
        [own] = offline.generate([list(prompt)], params, stop=["\n"])
        assert row["resps"] == [[own.text]]
        plain = own.text.translate(str.maketrans("", "", string.punctuation))
        right += plain.lower() == doc["choices"][doc["answer"]].lower()
    assert done.score == pytest.approx(right / len(DOCS))
