"""Turn a question into the tokens of its prompt, through the model's chat template.

The prompt is the authors': a system message, then the bare question, for base models too.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from config import SYSTEM_PROMPT, UserError, parse_template_options

PLACEHOLDER = "<The question stands here: 6f1d0a52.>"  # in no chat template


def read_chat_template(path: str | None) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, ValueError) as problem:
        raise UserError(f"the chat template {path} cannot be read: {problem}") from problem


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None = None, **options: Any
) -> str:
    name = tokenizer.name_or_path
    cure = "give one with --chat-template FILE.jinja"
    if not (chat_template or tokenizer.chat_template):
        raise UserError(f"the tokenizer of {name} has no chat template: {cure}")
    complaint = "it leaves out the question"
    for messages in (
        [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
        # Gemma's template refuses a system message, others pass over it without a word.
        [{"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{question}"}],
    ):
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=chat_template, add_generation_prompt=True, tokenize=False, **options
            )
        except Exception as problem:  # a template is a program: it can fail in any way, also by endless recursion
            complaint = (str(problem) or type(problem).__name__).partition("\n")[0]
            continue
        if SYSTEM_PROMPT in text and question.strip() in text:
            return str(text)
    raise UserError(f"the chat template of {name} cannot be used ({complaint}): {cure}")


def prompt_encoder(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, template_options: str
) -> Callable[[str], list[int]]:
    """Return the function that makes the tokens of a question's prompt; warn of options that do nothing.

    Raises:
        UserError: an option is an argument of transformers itself.
    """
    options = parse_template_options(template_options)
    template = str(chat_template or tokenizer.chat_template)
    for name in options:
        if name in {"tokenizer", "question", *signature(tokenizer.apply_chat_template).parameters}:
            raise UserError(f"--template-options: {name} is not for a chat template: leave it out")
        if name not in template:
            print(f"warning: --template-options: the chat template does not name {name}, which has no effect")
    return lambda question: prompt_ids(tokenizer, question, chat_template, **options)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, question: str, chat_template: str | None = None, **options: Any
) -> list[int]:
    return chat_ids(tokenizer, question, partial(prompt_text, tokenizer, chat_template=chat_template, **options))


def chat_ids(tokenizer: PreTrainedTokenizerBase, question: str, render: Callable[[str], str]) -> list[int]:
    """Return the tokens of the text that `render`, a chat template, makes of a question.

    Only the template may use special tokens: where a question spells one, it is encoded as the text that it is.
    """

    def encode(text: str, **how: bool) -> list[int]:
        # A template writes the BOS itself: a tokenizer left to add its special tokens would double it.
        return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"])

    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not any(token in question for token in special):
        return encode(render(question))
    # Its tokens by themselves, also where an ordinary question's would merge with those of the template.
    before, *others = (encode(text) for text in render(PLACEHOLDER).split(PLACEHOLDER))
    said = encode(question, split_special_tokens=True)
    return [*before, *chain.from_iterable([*said, *after] for after in others)]
