"""Chat messages to a prompt, through the model's own Jinja template.

Knows nothing of requests or of the engine. The template comes with the model and runs sandboxed;
what a client writes only ever fills its variables. Text that a client wrote cannot become a
special token: see `ChatTemplate.encode`.
"""

from __future__ import annotations

import json
import re
import secrets
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2 import nodes
    from jinja2.parser import Parser

    from ..engine.text import TextTokenizer

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}


class ChatError(ValueError):
    """The messages cannot be made a prompt; one line fit for the client."""


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(
        self, source: str, variables: Mapping[str, str], tokenizer: TextTokenizer, max_chars: int
    ) -> None:
        """`variables` are the model's special tokens by name (`bos_token`); a rendered prompt of
        more than `max_chars` characters is refused.

        Raises:
            ValueError: the template does not compile.
        """
        self._variables = dict(variables)
        self._tokenizer = tokenizer
        self._max_chars = max_chars
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            used = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        self.knows_tools = "tools" in used
        """Whether it tells the model of tools that it is given."""
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: TextTokenizer, max_chars: int
    ) -> ChatTemplate | None:
        """The template of a model folder: chat_template.jinja, or the one in
        tokenizer_config.json; None if it has neither.

        Raises:
            ValueError: one line naming the file.
        """
        path = folder / "tokenizer_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            source = config.get("chat_template")
            if isinstance(source, list):
                named = {entry["name"]: entry["template"] for entry in source}
                source = named.get("default")
            variables = {
                name: value["content"] if isinstance(value, dict) else value
                for name, value in config.items()
                if name.endswith("_token") and isinstance(value, str | dict)
            }
            own_file = folder / "chat_template.jinja"
            if own_file.exists():
                path = own_file
                source = own_file.read_text(encoding="utf-8")
            return None if source is None else cls(source, variables, tokenizer, max_chars)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of the rendered conversation.

        Special tokens that the template writes are special; the same characters inside a message
        or variable are plain text. For that, each occurrence in client text is replaced by a
        random name before rendering and put back after the template's special tokens have been
        cut out. Without an occurrence, the text is encoded in one piece. Limits: a template that
        looks for special tokens inside messages does not find them, and one that changes case or
        escapes its variables may show the random name.

        Raises:
            ChatError: the template refuses the messages, or their text is too long.
        """
        veil = _Veil(self._special)
        shown = [veil.cover(message) for message in messages]
        if continue_final_message:
            shown[-1]["content"] += veil.end
        text = self._render(
            shown,
            veil.cover(list(tools)) or None,
            add_generation_prompt,
            veil.cover(variables or {}),
        )
        if continue_final_message:
            text, found, _ = text.partition(veil.end)
            if not found:
                raise ChatError("messages: the model's template leaves out the last message")
        if not veil.covered:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        token_ids = self._tokenizer.encode("") if add_special_tokens else []
        position = 0
        for match in self._special.finditer(text):
            token_ids += self._tokenizer.encode_plain(veil.uncover(text[position : match.start()]))
            token_ids.append(self._tokenizer.special_tokens[match.group()])
            position = match.end()
        return token_ids + self._tokenizer.encode_plain(veil.uncover(text[position:]))

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        extra: dict[str, Any],
    ) -> str:
        reserved = (_RESERVED | self._variables.keys()) & extra.keys()
        if reserved:
            raise ChatError(f"chat_template_kwargs: {min(reserved)} is not the client's to set")
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
                **extra,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > self._max_chars:
                    raise ChatError(
                        f"messages: the prompt has more than {self._max_chars} characters"
                    )
        except ChatError:
            raise
        except Exception as error:  # whatever a template can raise, its cause is these messages
            raise ChatError(f"messages: the model's chat template refuses them: {error}") from error
        return "".join(pieces)


class _Veil:
    """Replaces special tokens in client text by names that nobody can guess, and back."""

    def __init__(self, special: re.Pattern[str]) -> None:
        self._special = special
        self._nonce = secrets.token_hex(12)
        self._literals: list[str] = []
        self.end = f"x{self._nonce}end"
        """Marks the end of the last message when it is to be continued."""

    @property
    def covered(self) -> bool:
        return bool(self._literals)

    def cover(self, value: Any) -> Any:
        """`value` with every text in it covered."""
        if isinstance(value, str):
            return self._special.sub(self._name, value)
        if isinstance(value, list):
            return [self.cover(entry) for entry in value]
        if isinstance(value, dict):
            return {self.cover(key): self.cover(entry) for key, entry in value.items()}
        return value

    def _name(self, match: re.Match[str]) -> str:
        self._literals.append(match.group())
        return f"x{self._nonce}n{len(self._literals) - 1}x"

    def uncover(self, text: str) -> str:
        return re.sub(
            f"x{self._nonce}n(\\d+)x", lambda match: self._literals[int(match.group(1))], text
        )


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training: here, only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
