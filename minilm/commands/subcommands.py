"""The work of each subcommand of `minilm`, from the parsed arguments to the printed lines.

Each function imports the libraries that it needs, so that a wrong argument ends the command at once.
"""

import argparse
import ast
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minilm.commands.fast_imports import quick_imports
from minilm.commands.text_input import format_row_number, read_file_rows, read_texts, row_field
from minilm.utils.log import show_log
from minilm.utils.output_streams import survive_closed_output
from minilm.utils.signals import interrupt_on_signals

# Texts whose cosines fit a terminal.
_MOST_COSINES = 20
# The part of a text that a line of a table shows.
_TEXT_CHARACTERS = 80


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
            _print_json({**fields, "mask": mask, "fills": [asdict(fill) for fill in fills]})
        if not masks:
            _print_json({**fields, "mask": None, "fills": []})
        return
    prefix = format_row_number(options, number, rows)
    for fill in (fill for fills in masks for fill in fills):
        print(f"{prefix}{fill.probability:6.1%}  {fill.token:<16}  {escape_line_breaks(fill.text)}")
    if not masks:
        print(prefix.rstrip())


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
                _print_json({**row_field(options, number), "input": text, "text": result})


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
        _print_json({**row_field(options, number), "input": text, **second, "labels": fields})
        return
    text = escape_line_breaks(text if pair is None else f"{text} | {pair}")
    prefix = format_row_number(options, number, rows)
    for label in best:
        score = f"{label.score:8.4f}" if is_regression else f"{label.score:6.1%}  {label.label:<16}"
        print(f"{prefix}{score}  {text}")
    if not labels:
        # A text without tokens has no label. It still has its line in the output.
        print(f"{prefix}{'-':>8}  {text}" if is_regression else f"{prefix}{'-':>6}  {'-':<16}  {text}")


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
            _print_json({**row_field(options, number), "input": text, "embedding": vector})
        return
    for number, (text, cosines) in enumerate(zip(texts, (vectors_NxH @ vectors_NxH.T).tolist(), strict=True)):
        prefix = format_row_number(options, number, len(texts))
        print(f"{prefix}{' '.join(f'{cosine:6.3f}' for cosine in cosines)}  {escape_line_breaks(text)}")


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
                _print_json({**fields, "answers": [asdict(answer) for answer in answers]})
                continue
            prefix = format_row_number(options, number, len(contexts))
            for answer in answers:
                print(f"{prefix}{answer.score:6.1%}  {escape_line_breaks(answer.text) or '(no answer)'}")
            if not answers:
                print(f"{prefix}{'-':>6}  -")


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
            _print_json({**fields, "spans": [asdict(span) for span in spans]})
            continue
        prefix = format_row_number(options, number, len(texts))
        for span in spans:
            print(f"{prefix}{span.score:6.1%}  {span.label:<16}  {escape_line_breaks(span.text)}")
        if not spans:
            # A text without a span still has its line in the output.
            print(f"{prefix}{'-':>6}  {'-':<16}  -")


def run_evaluate(options: argparse.Namespace) -> None:
    """Print the figures of a model on documents of the user, or on those of its run."""
    from minilm.config.command_line import parse_data_flags

    data = parse_data_flags(options.rest, "minilm evaluate DIR")
    with quick_imports():
        from minilm.commands.evaluate import evaluate
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        figures = evaluate(options.model, data)
    if options.json:
        _print_json(figures)
    else:
        width = max(map(len, figures))
        for name, value in figures.items():
            print(f"{name:<{width}}  {value:.6g}")


def run_ledger(options: argparse.Namespace) -> None:
    """Print the evaluation or training examples of a run with the highest losses, with their texts."""
    if options.train:
        _print_train_examples(options)
        return
    if options.duplicates:
        raise ValueError("--duplicates lists training examples: add --train")
    with quick_imports():
        from minilm.commands.hard_examples import find_hard_examples
        from minilm.models.inference import escape_line_breaks
        from minilm.utils.progress import quiet_transformers
    show_log()
    with quiet_transformers():
        examples = find_hard_examples(options.run, options.top, always_high=options.always_high)
    if not options.json:
        print(f"{'loss':>8}  {'targets':>7}  {'high in':>9}  {'document':>8}  text")
    for each in examples:
        if options.json:
            _print_json(asdict(each))
            continue
        high = f"{each.high} of {each.evaluations}"
        text = escape_line_breaks(each.text or "-")[:_TEXT_CHARACTERS]
        print(f"{each.loss:8.3f}  {each.targets:7}  {high:>9}  {each.document:8}  {text}")


def _print_train_examples(options: argparse.Namespace) -> None:
    """Print the training examples with the highest losses, or near-duplicates, and the share that is still learnt."""
    with quick_imports():
        from minilm.commands.train_examples import find_duplicates, find_hardest, measure_learning, read_losses
        from minilm.models.inference import escape_line_breaks
        from minilm.utils.progress import quiet_transformers
    show_log()
    with quiet_transformers():
        losses = read_losses(options.run)
        if options.duplicates:
            examples = find_duplicates(losses, options.top)
        else:
            examples = find_hardest(losses, options.top, always_high=options.always_high)
    learning = measure_learning(losses)
    if options.json:
        for each in examples:
            _print_json(asdict(each))
        _print_json({"still_learning": learning})
        return
    print(f"{'loss':>8}  {'high in':>9}  {'example':>8}  {'copy of':>8}  text")
    for each in examples:
        high = f"{each.high} of {each.epochs}"
        copied = "-" if each.duplicate_of is None else each.duplicate_of
        text = escape_line_breaks(each.text)[:_TEXT_CHARACTERS]
        print(f"{each.loss:8.3f}  {high:>9}  {each.example:8}  {copied:>8}  {text}")
    if learning is not None:
        print(f"{learning:.0%} of the examples have a loss that fell between the last two epochs by more than noise")


def run_compare(options: argparse.Namespace) -> None:
    """Print the differences of two models on the same evaluation examples."""
    from minilm.config.command_line import parse_data_flags

    data = parse_data_flags(options.rest, "minilm compare A B")
    with quick_imports():
        from minilm.commands.compare import compare_models
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        differences = compare_models(options.first, options.second, data)
    for difference in differences:
        if options.json:
            _print_json(asdict(difference))
        else:
            print(difference)


def run_export(options: argparse.Namespace) -> None:
    """Write the model of a run or a checkpoint to a new folder."""
    with quick_imports():
        from minilm.commands.export import export_model
        from minilm.utils.progress import quiet_transformers
    with quiet_transformers():
        print(f"written: {export_model(options.model, options.output, options.format)}")


def run_branch(options: argparse.Namespace) -> None:
    """Start a new run from a checkpoint of another run, with the settings of that run and the flags that follow."""
    from minilm.config.command_line import parse_flags
    from minilm.config.serialization import read_checkpoint_config

    origin = Path(options.folder)
    checkpoint = origin / f"checkpoint-{options.at}"
    if not checkpoint.is_dir():
        steps = [path.name.removeprefix("checkpoint-") for path in origin.glob("checkpoint-*")]
        there = ", ".join(sorted(filter(str.isdecimal, steps), key=int)) or "none"
        raise ValueError(f"{origin} has no checkpoint of step {options.at}; it has: {there}")
    config = parse_flags(read_checkpoint_config(checkpoint), arguments=options.rest)
    if config.run.resume not in (None, "latest"):
        raise ValueError(
            "minilm branch starts from the checkpoint of --at: leave run.resume out, or pass latest to resume a branch "
            "that was stopped"
        )
    named = origin if origin.name not in ("", "..") else origin.resolve()
    folder = config.run.output_dir or f"{named}-from-{options.at}"
    if Path(folder).expanduser().resolve() == origin.resolve():
        raise ValueError(f"run.output_dir {folder} is the folder of the run itself: give a new folder for the branch")
    config = replace(config, run=replace(config.run, resume=config.run.resume or str(checkpoint), output_dir=folder))
    show_log()
    with quick_imports():
        from minilm.train import train
    with interrupt_on_signals(), survive_closed_output():
        train(config)


def run_verify(options: argparse.Namespace) -> None:
    """Print one line for each stretch of a run that was repeated. Exit with status 1 if one is not equal."""
    with quick_imports():
        from minilm.commands.verify import verify_run
    show_log()
    with interrupt_on_signals(), survive_closed_output():
        results = verify_run(Path(options.folder), options.windows)
    for result in results:
        print(result)
    if any(result.differences for result in results):
        sys.exit(1)


def run_replay(options: argparse.Namespace) -> None:
    """Print what some training documents contributed to the figures of a run."""
    show_log()
    with quick_imports():
        from minilm.commands.replay import replay_run
    with interrupt_on_signals(), survive_closed_output():
        differences, still_seen = replay_run(Path(options.folder), options.without, options.rest)
    for each in differences:
        print(f"{each.figure}: {each.first:.6g} with the documents, {each.second:.6g} without: {each}")
    if differences:
        print(still_seen)


def run_merge(options: argparse.Namespace) -> None:
    """Write the mean of several models to a new folder."""
    with quick_imports():
        from minilm.commands.merge import merge_models
    print(f"written: {merge_models(options.models, options.output, options.weights)}")


def run_tokenize(options: argparse.Namespace) -> None:
    """Write the tokens of texts to a folder."""
    with quick_imports():
        from minilm.config import Data
        from minilm.data.tokenize_source import tokenize
    show_log()
    data = Data(
        source=tuple(options.sources),
        column=options.column,
        document=options.document,
        eval_fraction=options.eval_fraction,
    )
    tokens = tokenize(data, options.tokenizer, options.output, words=options.words, processes=options.processes)
    print(f"written: {options.output}, {tokens:,} tokens")


def run_suite(options: argparse.Namespace) -> None:
    """Fine-tune a model on tasks of GLUE and SuperGLUE, and print the table; or describe the runs."""
    from minilm.commands import suite

    show_log()
    planned = suite.plan_suite(
        options.model,
        tasks=options.tasks,
        folders=options.data,
        rates=options.rates,
        seeds=options.seeds,
        output=options.output,
        jobs=options.jobs,
        keep_models=options.keep_models,
        flags=options.rest,
    )
    with interrupt_on_signals(), survive_closed_output():
        if options.dry_run:
            print(suite.describe_suite(planned))
        else:
            suite.train_suite(planned)


def run_report(options: argparse.Namespace) -> None:
    """Write the report about one or several runs, with --live until they have ended."""
    from minilm.commands.report import write_live_report, write_report

    if options.live:
        with interrupt_on_signals():
            for number, (path, runs) in enumerate(write_live_report(options.folders, options.output)):
                running = ", ".join(run.name for run in runs if run.running)
                if number == 0 and running:
                    print(
                        f"written: {path}; writing it again while these runs go on: {running} (ctrl-C ends)", flush=True
                    )
        print(f"written: {path}; no run goes on")
        return
    for path in write_report(options.folders, options.output, png=options.png):
        print(f"written: {path}")


def run_doctor(options: argparse.Namespace) -> None:
    """Print one line for each check of this machine. Exit with status 1 if there is something to fix."""
    with quick_imports():
        from minilm.commands.doctor import check_machine
    needs_fixing = False
    for finding in check_machine():
        needs_fixing |= bool(finding.fix)
        if options.json:
            print(json.dumps(asdict(finding), ensure_ascii=False), flush=True)
        else:
            fix = f" -> {finding.fix}" if finding.fix else ""
            print(f"{'FIX' if fix else 'ok':<5} {finding.what:<10} {finding.found}{fix}", flush=True)
    if needs_fixing:
        sys.exit(1)


def list_recipes(options: argparse.Namespace) -> None:
    """Print the recipes of this checkout with their first lines, and how to start one."""
    folder = Path(__file__).parents[2] / "recipes"
    recipes = sorted(folder.glob("*.py"))
    if not recipes:
        raise ValueError(
            "a recipe, a file of about 25 lines, starts the training: clone the repository, which has recipes in "
            "recipes/, or write one that ends in minilm.commands.recipe.run_recipe(CONFIG)"
        )
    print(f"A recipe starts the training. Those in {folder}:\n")
    for recipe in recipes:
        summary = (ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"  {recipe.name:<20} {summary}")
    print(f"\nStart one:    accelerate launch {shlex.quote(str(folder / 'mlm_pydocs.py'))}")
    print("See its flags: python RECIPE --help    Try it without output: python RECIPE --dry-run")
    if options.rest:
        raise ValueError(f"minilm train takes no arguments: pass {shlex.join(options.rest)} to a recipe")


def _print_json(line: dict[str, Any]) -> None:
    print(json.dumps(line, ensure_ascii=False))
