"""Commands that use a model: fill-mask, generate, classify, embed, answer and tag.

Each command has its arguments in `add_…` and its work in `run_…`. The work imports the libraries that it needs, so that
a wrong argument ends the command at once.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from minilm.commands.command_arguments import (
    add_command,
    add_model,
    parse_not_negative,
    parse_positive,
    parse_probability,
    parse_whole,
    print_json,
)
from minilm.commands.fast_imports import quick_imports
from minilm.commands.text_input import add_texts, format_row_number, read_file_rows, read_texts, row_field

# Texts whose cosines fit a terminal.
_MOST_COSINES = 20


def _add_text_command(
    commands: Any, name: str, work: Callable[[argparse.Namespace], None], summary: str, kind: str
) -> argparse.ArgumentParser:
    """Add a command that gives texts to a model of this kind, and return its parser."""
    command: argparse.ArgumentParser = add_command(commands, name, work, summary)
    add_model(command, kind)
    add_texts(command)
    return command


def add_fill_mask(commands: Any) -> None:
    """Add `minilm fill-mask` and its arguments."""
    command = _add_text_command(commands, "fill-mask", run_fill_mask, "the likeliest words for a mask", "masked LM")
    command.description = 'Show the likeliest tokens for each mask of each text: minilm fill-mask DIR "A [MASK] barks."'
    command.add_argument(
        "--top-k", type=parse_positive, default=5, metavar="K", help="number of candidates for each mask (default: 5)"
    )


def run_fill_mask(options: argparse.Namespace) -> None:
    """Print the likeliest tokens for each mask of each text."""
    with quick_imports():
        from minilm.models.inference import check_masks, fill_mask, load_masked_lm
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        texts = read_texts(options)
        model, tokenizer = load_masked_lm(options.model)
        check_masks(model, tokenizer, [text for text in texts if text.strip()])
        for number, text in enumerate(texts):
            # A blank row has no mask. It still has its line in the output.
            masks = fill_mask(model, tokenizer, [text], top_k=options.top_k)[0] if text.strip() else []
            if number and not options.json:
                print()
            _print_fills(options, masks, text, number, len(texts))


def _print_fills(options: argparse.Namespace, masks: Any, text: str, number: int, rows: int) -> None:
    """Print the candidates for each mask of one text; one line without candidates if the text has no mask."""
    from minilm.models.inference import escape_line_breaks

    if options.json:
        fields = {**row_field(options, number), "input": text}
        for mask, fills in enumerate(masks):
            print_json({**fields, "mask": mask, "fills": [asdict(fill) for fill in fills]})
        if not masks:
            print_json({**fields, "mask": None, "fills": []})
        return
    prefix = format_row_number(options, number, rows)
    for fill in (fill for fills in masks for fill in fills):
        print(f"{prefix}{fill.probability:6.1%}  {fill.token:<16}  {escape_line_breaks(fill.text)}")
    if not masks:
        print(prefix.rstrip())


def add_generate(commands: Any) -> None:
    """Add `minilm generate` and its arguments."""
    command = _add_text_command(commands, "generate", run_generate, "continue a text", "causal LM")
    command.description = 'Continue each text with a causal LM: minilm generate DIR "Once upon a time" --top-p 0.95'
    command.add_argument(
        "--chat",
        nargs="*",
        metavar="TEXT",
        help="answer each text as the message of a user, by the chat template of the tokenizer",
    )
    command.add_argument(
        "--max-new-tokens",
        type=parse_positive,
        metavar="N",
        help="maximum number of new tokens (default: 100, or as many as the model has room for)",
    )
    command.add_argument(
        "--temperature",
        type=parse_not_negative,
        default=1.0,
        metavar="T",
        help="below 1 likely tokens become likelier; 0 always takes the likeliest (default: 1)",
    )
    command.add_argument(
        "--top-k",
        type=parse_whole,
        default=50,
        metavar="K",
        help="draw from the K likeliest tokens (default: 50; 0: from all)",
    )
    command.add_argument(
        "--top-p",
        type=parse_probability,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P (default: 1)",
    )
    command.add_argument(
        "--seed",
        type=parse_whole,
        default=0,
        metavar="S",
        help="seed of the draws; another seed gives another text (default: 0)",
    )


def run_generate(options: argparse.Namespace) -> None:
    """Print a continuation of each text, or with --chat an answer to it."""
    with quick_imports():
        from minilm.models.inference import check_prompts, generate, load_causal_lm
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        chat = options.chat is not None
        # The texts may stand before or after --chat.
        options.texts += options.chat or []
        texts = read_texts(options)
        model, tokenizer = load_causal_lm(options.model)
        check_prompts(model, tokenizer, texts, max_new_tokens=options.max_new_tokens or 1, chat=chat)
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        settings = {name: getattr(options, name) for name in names}
        for number, text in enumerate(texts):
            if number and not options.json:
                print()
            if not options.json:
                print(format_row_number(options, number, len(texts)), end="", flush=True)
            (result,) = generate(model, tokenizer, [text], **settings, stream=not options.json, chat=chat)
            if options.json:
                print_json({**row_field(options, number), "input": text, "text": result})


def add_classify(commands: Any) -> None:
    """Add `minilm classify` and its arguments."""
    command = _add_text_command(
        commands, "classify", run_classify, "the class of a text or a pair", "sequence classifier"
    )
    command.description = (
        'Print the class of each text: minilm classify DIR "Great fun!"; --pair TEXT adds a second text.'
    )
    command.add_argument("--pair", metavar="TEXT", help="second text of a pair")
    command.add_argument("--pair-column", metavar="NAME", help="column of --file that holds the second text")
    command.add_argument(
        "--top-k",
        type=parse_positive,
        default=1,
        metavar="K",
        help="number of labels to print, best first (default: 1)",
    )


def run_classify(options: argparse.Namespace) -> None:
    """Print the likeliest labels of each text or pair, or the number that a regression predicts."""
    with quick_imports():
        from minilm.models.inference import classify, load_classifier
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        texts, pairs = _read_pairs(options)
        model, tokenizer = load_classifier(options.model)
        is_regression = model.config.problem_type == "regression"
        for number, labels in enumerate(classify(model, tokenizer, texts, pairs)):
            pair = None if pairs is None else pairs[number]
            _print_labels(options, labels, texts[number], pair, number, len(texts), is_regression=is_regression)


def _read_pairs(options: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    """Return the texts to classify, and their second texts, or None if there are none."""
    if options.pair_column is not None:
        if options.file is None or options.pair is not None:
            raise ValueError("--pair-column is a column of --file: give --file and no --pair, or --pair TEXT alone")
        rows = read_file_rows(options)
        return list(rows["text"]), list(rows["pair"])
    texts = read_texts(options)
    return texts, None if options.pair is None else [options.pair] * len(texts)


def _print_labels(
    options: argparse.Namespace,
    labels: Any,
    text: str,
    pair: str | None,
    number: int,
    rows: int,
    *,
    is_regression: bool,
) -> None:
    """Print the best labels of one text, one per line, or as one JSON object."""
    from minilm.models.inference import escape_line_breaks

    best = labels[: options.top_k]
    if options.json:
        second = {} if pair is None else {"pair": pair}
        fields = [asdict(label) for label in best]
        print_json({**row_field(options, number), "input": text, **second, "labels": fields})
        return
    text = escape_line_breaks(text if pair is None else f"{text} | {pair}")
    prefix = format_row_number(options, number, rows)
    for label in best:
        score = f"{label.score:8.4f}" if is_regression else f"{label.score:6.1%}  {label.label:<16}"
        print(f"{prefix}{score}  {text}")
    if not labels:
        # A text without tokens has no label. It still has its line in the output.
        print(f"{prefix}{'-':>8}  {text}" if is_regression else f"{prefix}{'-':>6}  {'-':<16}  {text}")


def add_embed(commands: Any) -> None:
    """Add `minilm embed` and its arguments."""
    command = _add_text_command(
        commands, "embed", run_embed, "how near texts are, or their embeddings", "sentence embedding model"
    )
    command.description = (
        'Print the cosine of each text with each other one: minilm embed DIR "A dog barks." "A cat purrs."; --json '
        "prints the embedding of each text."
    )
    command.add_argument(
        "--pooling",
        choices=("mean", "first", "last"),
        help="how hidden states become an embedding (default: as the folder says)",
    )


def run_embed(options: argparse.Namespace) -> None:
    """Print the cosine of each text with each other one, or the embedding of each text."""
    with quick_imports():
        from minilm.models.inference import escape_line_breaks
        from minilm.models.inference_embedding import embed, load_embedding_model
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        texts = read_texts(options)
        if len(texts) > _MOST_COSINES and not options.json:
            raise ValueError(f"{len(texts):,} texts: the cosines of at most {_MOST_COSINES} are shown; pass --json")
        vectors_NxH = embed(*load_embedding_model(options.model, options.pooling), texts)
    if options.json:
        for number, (text, vector) in enumerate(zip(texts, vectors_NxH.tolist(), strict=True)):
            print_json({**row_field(options, number), "input": text, "embedding": vector})
        return
    for number, (text, cosines) in enumerate(zip(texts, (vectors_NxH @ vectors_NxH.T).tolist(), strict=True)):
        prefix = format_row_number(options, number, len(texts))
        print(f"{prefix}{' '.join(f'{cosine:6.3f}' for cosine in cosines)}  {escape_line_breaks(text)}")


def add_answer(commands: Any) -> None:
    """Add `minilm answer` and its arguments."""
    command = _add_text_command(
        commands, "answer", run_answer, "the answer to a question in a text", "model for question answering"
    )
    command.description = (
        'Find the answer to a question in each text: minilm answer DIR --question "Who barks?" "The dog barks."'
    )
    command.add_argument("--question", metavar="TEXT", required=True, help="the question")
    command.add_argument(
        "--no-answer",
        action="store_true",
        help="a text may have no answer: for models that were trained on such questions, as those of SQuAD 2.0",
    )
    command.add_argument(
        "--max-answer", type=parse_positive, default=30, metavar="N", help="maximum tokens of an answer (default: 30)"
    )
    command.add_argument(
        "--top-k",
        type=parse_positive,
        default=1,
        metavar="K",
        help="number of answers to print, best first (default: 1)",
    )


def run_answer(options: argparse.Namespace) -> None:
    """Print the best answers to a question in each context."""
    with quick_imports():
        from minilm.models.inference import escape_line_breaks
        from minilm.models.inference_answers import find_answers, load_question_answerer
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        contexts = read_texts(options)
        model, tokenizer = load_question_answerer(options.model)
        settings = {name: getattr(options, name) for name in ("top_k", "no_answer", "max_answer")}
        for number, context in enumerate(contexts):
            # A blank row has no answer. It still has its line in the output.
            blank = not context.strip()
            answers = [] if blank else find_answers(model, tokenizer, options.question, [context], **settings)[0]
            if options.json:
                fields = {**row_field(options, number), "question": options.question, "input": context}
                print_json({**fields, "answers": [asdict(answer) for answer in answers]})
                continue
            prefix = format_row_number(options, number, len(contexts))
            for answer in answers:
                print(f"{prefix}{answer.score:6.1%}  {escape_line_breaks(answer.text) or '(no answer)'}")
            if not answers:
                print(f"{prefix}{'-':>6}  -")


def add_tag(commands: Any) -> None:
    """Add `minilm tag` and its arguments."""
    command = _add_text_command(
        commands, "tag", run_tag, "the tagged spans of a text, such as its names", "token classifier"
    )
    command.description = 'Find the spans of words in each text whose tag is not O: minilm tag DIR "Ada lives in Rome."'
    command.add_argument(
        "--strategy",
        choices=("none", "simple", "first", "average", "max"),
        default="first",
        help="how tokens give spans, as aggregation_strategy of transformers' pipeline (default: first)",
    )


def run_tag(options: argparse.Namespace) -> None:
    """Print the tagged spans of each text."""
    with quick_imports():
        from minilm.models.inference import escape_line_breaks
        from minilm.models.inference_tags import load_token_classifier, tag_texts
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        texts = read_texts(options)
        spans_of_texts = tag_texts(*load_token_classifier(options.model), texts, options.strategy)
    for number, (text, spans) in enumerate(zip(texts, spans_of_texts, strict=True)):
        if options.json:
            fields = {**row_field(options, number), "input": text}
            print_json({**fields, "spans": [asdict(span) for span in spans]})
            continue
        prefix = format_row_number(options, number, len(texts))
        for span in spans:
            print(f"{prefix}{span.score:6.1%}  {span.label:<16}  {escape_line_breaks(span.text)}")
        if not spans:
            # A text without a span still has its line in the output.
            print(f"{prefix}{'-':>6}  {'-':<16}  -")
