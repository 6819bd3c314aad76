"""A chat format, learnt from a Jinja chat template by rendering chats, and as a template of Ollama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Chat = Sequence[tuple[str, str]]  # (role, content)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """The text around the contents of a chat: one string for each place between two of them.

    `system` is (before, after) a system message that opens the chat, None if the format has no such message.
    """

    system: tuple[str, str] | None
    opening: str  # before the first user message, without a system message
    answer: str  # after a user message, up to where the model begins
    lead: str  # before an answer that was given; the model writes it itself
    following: str  # between an answer and the next user message

    def render(self, chat: Chat) -> str:
        """Return the prompt of a chat that ends with a user message, as Ollama makes it from `go_template`."""
        parts = [self.opening]
        for role, content in chat:
            if role == "system":
                parts = [self.system[0], content, self.system[1]] if self.system else parts
            elif role == "user":
                parts += [content, self.answer]
            else:
                parts += [self.lead, content, self.following]
        return "".join(parts)

    @property
    def is_writable(self) -> bool:
        """Whether no text is taken for an action of the template or for the end of the Modelfile's quotation."""
        texts = (*(self.system or ()), self.opening, self.answer, self.lead, self.following)
        is_text = not any("{{" in text or text.endswith("{") for text in texts)
        return is_text and '"""' not in f'""{self.go_template()}'

    def go_template(self) -> str:
        """Return the format as a template of Ollama's, which are Go's text/template."""
        start = self.opening
        if self.system is not None:
            before, after = self.system
            start = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{start}{{{{ end }}}}"
        is_last = "{{ if lt 1 (len (slice $.Messages $i)) }}"
        return (
            f'{start}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{self.answer}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.lead}{{{{ .Content }}}}{is_last}{self.following}'
            "{{ end }}{{ end }}{{ end }}"
        )


def chat_format(template: str, tokenizer_config: Mapping[str, Any]) -> ChatFormat | None:
    """Learn the format that a Jinja chat template writes, by rendering chats; None unless it explains longer ones too.

    The start token is left out where the runtime writes it.
    """
    render = _renderer(template, tokenizer_config)
    system, user, answer, again = "<0system0>", "<0user0>", "<0answer0>", "<0again0>"
    dialogue = (("user", user), ("assistant", answer), ("user", again))
    turns = _between(render(dialogue), user, answer, again)
    if turns is None or not turns[1].startswith(turns[3]):
        return None
    told = _between(render((("system", system), *dialogue[:1])), system, user)
    learnt = ChatFormat(
        system=None if told is None else (told[0], told[1]),
        opening=turns[0],
        answer=turns[3],
        lead=turns[1].removeprefix(turns[3]),
        following=turns[2],
    )
    chats: list[Chat] = [dialogue[:1], dialogue, (*dialogue, ("assistant", "No.\n\n1. {x}"), ("user", "Why  so?"))]
    if told is not None:
        chats += [(("system", "Be brief."), *chat) for chat in chats]
    return learnt if all(render(chat) == learnt.render(chat) for chat in chats) else None


def _renderer(template: str, config: Mapping[str, Any]) -> Callable[[Chat], str | None]:
    """Return what renders a chat as transformers does, None where the template refuses it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    tokens = {name: token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    adds_bos, bos = config.get("add_bos_token"), tokens["bos_token"]
    if adds_bos is not False:
        tokens["bos_token"] = ""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    failures = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)

    def render(chat: Chat) -> str | None:
        messages = [{"role": role, "content": content} for role, content in chat]
        try:
            text = environment.from_string(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **tokens
            )
        except failures:
            return None
        return text.removeprefix(bos) if adds_bos is True else text

    return render


def _between(text: str | None, *marks: str) -> list[str] | None:
    """Return the pieces between the marks, None unless each mark is there once, in this order."""
    pieces = []
    for mark in marks:
        piece, found, text = (text or "").partition(mark)
        if not found or mark in text:
            return None
        pieces.append(piece)
    return [*pieces, text or ""]


def token_text(entry: object) -> str:
    """The config names a token by its text or by an object that has it as content."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else ""
