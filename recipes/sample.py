"""Text that a model writes itself, as token ids: what a retrofit is held to (see retrofit.py).

    python recipes/sample.py MODEL OUT_FOLDER --answers 2 --free 1000

Writes `chats.npy` (answers to questions of this file, in the model's chat format), `chats-held-out`
(answers to questions about other subjects) and `free.npy` (text begun from nothing). The engine
samples them. Each text ends with the end-of-text token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from convserve.engine import LLM, SamplingParams

ASKED = (
    "What is {}?",
    "Explain {} to a ten year old.",
    "Give me five facts about {}.",
    "Write a short story that has something to do with {}.",
    "Why do people care about {}?",
    "Summarize the history of {} in one paragraph.",
    "I have to give a talk about {}. What should I say first?",
    "What are common misunderstandings about {}?",
    "Write a polite email to a colleague about {}.",
    "Compare {} with something similar.",
    "Make a plan to learn about {} in a week.",
    "Tell me a joke about {}.",
)
SUBJECTS = (
    "the moon;bread;photosynthesis;the French Revolution;chess;volcanoes;jazz;bicycles;whales;"
    "democracy;the human heart;coffee;prime numbers;climate change;Shakespeare;vaccines;gardening;"
    "black holes;the stock market;dogs;the Roman Empire;electricity;poetry;football;dreams;honey;"
    "the internet;earthquakes;painting;sleep;trains;rivers;music lessons;a healthy breakfast;"
    "Python programming;the number zero;robots;friendship;winter;taxes"
)
HELD_OUT_SUBJECTS = "penguins;sorting algorithms;the Cold War;cheese;gravity;public libraries"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--answers", type=int, default=2, help="to each question")
    parser.add_argument("--questions", type=int, help="at most; default: all")
    parser.add_argument("--free", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--sequences", type=int, default=256, help="at once")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory", default="auto", help="of keys and values")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def questions(subjects: str) -> list[str]:
    """Every way of asking about every subject."""
    return [form.format(subject) for form in ASKED for subject in subjects.split(";")]


def chat(question: str) -> str:
    """A conversation in the format of SmolLM2-Instruct, up to the answer."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def main(args: argparse.Namespace) -> None:
    """Samples the three sets."""
    llm = LLM(
        args.model,
        device=args.device,
        max_num_seqs=args.sequences,
        max_model_len=1024,
        memory=args.memory,
        threads=args.threads,
        cuda_graphs=args.graphs,
    )
    encode = llm.tokenizer.encode
    end = encode("<|endoftext|>")
    args.out.mkdir(parents=True, exist_ok=True)

    def sample(name: str, prompts: list[list[int]], n: int, temperature: float, stop: bool) -> None:
        begun, pieces = time.monotonic(), []
        # Prompts that are alike need seeds of their own, so those of one call must differ.
        at_once = 1 if prompts[0] == prompts[-1] else max(4 * args.sequences // n, 1)
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            params = SamplingParams(
                n=n,
                max_tokens=args.max_tokens,
                temperature=temperature,
                seed=args.seed + start,
                ignore_eos=not stop,
            )
            for i, completion in enumerate(llm.generate(some, params)):
                pieces += [*some[i // n], *completion.token_ids, *end]
            np.save(args.out / f"{name}.npy", np.array(pieces, dtype=np.uint16))
            rate = len(pieces) / (time.monotonic() - begun)
            print(f"{name}: {len(pieces)} tokens, {rate:.0f} per second", flush=True)

    for name, subjects in (("chats-held-out", HELD_OUT_SUBJECTS), ("chats", SUBJECTS)):
        prompts = [encode(chat(question)) for question in questions(subjects)]
        sample(name, prompts[: args.questions], args.answers, 0.8, stop=True)
    n = min(args.free, 128)
    sample("free", [list(end)] * (args.free // n), n, 1.0, stop=False)


if __name__ == "__main__":
    main(arguments().parse_args())
