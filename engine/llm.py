"""The offline engine: prompts in, completions out, in this process.

Goes through the same scheduler, cache and step as the server.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .config import EngineConfig
from .loop import refuse
from .messages import GenerateRequest, SamplingParams
from .start import start_engine
from .text import OutputText, StopStrings, TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .messages import EngineStats, FinishReason, Logprobs, TokenEvent

Prompt = str | list[int]


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt."""

    text: str
    token_ids: list[int]
    """Generated tokens, an ending eos or stop token included."""
    finish_reason: FinishReason
    logprobs: list[Logprobs] | None
    """One per token, if `SamplingParams.logprobs` asked for them."""
    num_cached_tokens: int
    prompt_logprobs: list[Logprobs | None] | None
    """One per prompt token, if asked for; the first is None. With n > 1, on the first choice."""


class LLM:
    """A loaded model that completes prompts."""

    def __init__(self, model: str | Path, **engine_options: Any) -> None:
        """Loads a model folder.

        Args:
            model: a folder in Hugging Face layout.
            engine_options: fields of `EngineConfig` (device, dtype, max_num_seqs, memory, ...).

        Raises:
            TypeError: an unknown option. ModelError, ConfigError: what is wrong with the model or
                the options, in one line.
        """
        known = set(EngineConfig.__struct_fields__)
        for name in engine_options:
            if name not in known:
                raise TypeError(f"{name} is not an engine option (known: {', '.join(known)})")
        options = {"model": str(model), **engine_options}
        options["conv_adapter"] = str(options.get("conv_adapter") or "")
        try:
            config = msgspec.convert(options, EngineConfig)
        except msgspec.ValidationError as error:
            raise TypeError(str(error)) from None
        self._core, self.info = start_engine(config)
        self._folder = Path(model)
        self._tokenizer: TextTokenizer | None = None
        self._numbers = itertools.count()

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters of the engine, now."""
        return self._core.stats()

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer; a folder without one serves token ids alone.

        Raises:
            ValueError: the folder has none, or not a usable one.
        """
        if self._tokenizer is None:
            self._tokenizer = TextTokenizer.from_folder(self._folder)
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Completes prompts together; n completions for each prompt, in order.

        Args:
            prompts: text, token ids, or a list of either.
            stop: strings that end a completion and are not part of its text.

        Raises:
            ValueError: a prompt that is empty or too long, a parameter out of range.
        """
        params = sampling_params or SamplingParams()
        texts = _is_text_model(self._folder)
        stops = StopStrings(stop) if stop else None
        collectors: dict[tuple[str, int], _Collector] = {}
        for prompt in _as_list(prompts):
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            request = self._request(ids, params)
            for index in range(params.n):
                text = (
                    OutputText(self.tokenizer, stops=stops, prompt=ids) if texts or stops else None
                )
                collectors[request.request_id, index] = _Collector(text)
            self._core.add(request)
        self._run(collectors)
        return [c.completion() for c in collectors.values()]

    def score(self, sequences: Iterable[Sequence[int]]) -> list[list[float | None]]:
        """Log-probability of each token given the ones before it; the first of each is None.

        Raises:
            ValueError: a sequence that is empty or too long, a token id out of the vocabulary.
        """
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
        collectors: dict[tuple[str, int], _Collector] = {}
        for ids in sequences:
            request = self._request(ids, params)
            collectors[request.request_id, 0] = _Collector(None)
            self._core.add(request)
        self._run(collectors)
        return [
            [None if p is None else p.logprob for p in c.prompt_logprobs or ()]
            for c in collectors.values()
        ]

    def _request(self, ids: Sequence[int], params: SamplingParams) -> GenerateRequest:
        request = GenerateRequest(
            request_id=f"llm-{next(self._numbers)}", prompt=tuple(ids), params=params
        )
        problem = refuse(request, self.info)
        if problem is not None:
            self._core.abort_all()
            raise ValueError(problem)
        return request

    def _run(self, collectors: dict[tuple[str, int], _Collector]) -> None:
        try:
            while self._core.has_work:
                for event in self._core.step():
                    if collectors[event.request_id, event.index].take(event):
                        self._core.abort(event.request_id, event.index)
        except BaseException:
            self._core.abort_all()
            raise


class _Collector:
    """One completion as its events arrive."""

    def __init__(self, text: OutputText | None) -> None:
        self._text = text
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._finish: FinishReason = "abort"
        self._num_cached = 0
        self.prompt_logprobs: list[Logprobs | None] | None = None

    def take(self, event: TokenEvent) -> bool:
        """Adds an event; true if a stop string ended the completion."""
        if event.error is not None:
            raise RuntimeError(event.error)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = list(event.prompt_logprobs)
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        self._token_ids += event.token_ids
        self._logprobs += event.logprobs
        if event.finish_reason is not None:
            self._finish = event.finish_reason
        if self._text is None:
            return False
        for token in event.token_ids:
            self._pieces.append(self._text.push(token, hidden=event.finish_reason == "stop"))
        if event.finish_reason is None and self._text.stop is not None:
            self._finish = "stop"
            return True
        return False

    def completion(self) -> Completion:
        """The whole of it."""
        if self._text is not None:
            self._pieces.append(self._text.finish())
        return Completion(
            "".join(self._pieces),
            self._token_ids,
            self._finish,
            self._logprobs or None,
            self._num_cached,
            self.prompt_logprobs,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    given = list(prompts)
    if given and isinstance(given[0], int):
        return [[int(token) for token in given if isinstance(token, int)]]
    return [p if isinstance(p, str) else list(p) for p in given if not isinstance(p, int)]


def _is_text_model(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists()
