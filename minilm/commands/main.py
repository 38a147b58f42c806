"""The `minilm` command: its subcommands and their arguments."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilm.commands.completion import SHELLS, PrintCompletion
from minilm.commands.recipe import exit_on_error, quick_exit
from minilm.commands.subcommands import (
    list_recipes,
    run_answer,
    run_branch,
    run_classify,
    run_compare,
    run_doctor,
    run_embed,
    run_evaluate,
    run_export,
    run_fill_mask,
    run_generate,
    run_ledger,
    run_merge,
    run_replay,
    run_report,
    run_suite,
    run_tag,
    run_tokenize,
    run_verify,
)
from minilm.data.glue import TASKS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, by default that of this process, which ends then."""
    with quick_exit() if arguments is None else nullcontext():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no text after an option if none is before it: minilm answer DIR --question "Who?" "Bob."
    if not getattr(options, "texts", True) and all(word == "-" or not word.startswith("-") for word in rest):
        options.texts, rest = rest, []
    if rest and options.command not in ("branch", "compare", "evaluate", "replay", "suite", "train"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    exit_on_error(lambda: options.work(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. The parsed `work` is the function of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="minilm", description="Use models trained with minilm, or other models of the same kinds."
    )
    parser.add_argument(
        "--completion", action=PrintCompletion, choices=SHELLS, help="print a script that lets the shell complete words"
    )
    parser.add_argument("--version", action="version", version=f"minilm {version('minilm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fill_mask(commands)
    _add_generate(commands)
    _add_classify(commands)
    _add_embed(commands)
    _add_answer(commands)
    _add_tag(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_ledger(commands)
    _add_export(commands)
    _add_report(commands)
    _add_doctor(commands)
    _add_branch(commands)
    _add_verify(commands)
    _add_replay(commands)
    _add_merge(commands)
    _add_tokenize(commands)
    _add_suite(commands)
    train = _add_command(commands, "train", list_recipes, "list the recipes, and show how to start one")
    train.description = "List the recipes. A recipe starts the training: accelerate launch recipes/NAME.py"
    return parser


def _add_command(commands: Any, name: str, work: Callable[[argparse.Namespace], None], summary: str) -> Any:
    """Add a subcommand whose function is `work`, and return its parser."""
    command = commands.add_parser(name, help=summary)
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.set_defaults(work=work)
    return command


def _add_fill_mask(commands: Any) -> None:
    command = _add_command(commands, "fill-mask", run_fill_mask, "the likeliest words for a mask")
    _add_model(command, "masked LM")
    _add_texts(command)
    command.description = 'Show the likeliest tokens for each mask of each text: minilm fill-mask DIR "A [MASK] barks."'
    command.add_argument(
        "--top-k", type=_positive, default=5, metavar="K", help="number of candidates for each mask (default: 5)"
    )


def _add_generate(commands: Any) -> None:
    command = _add_command(commands, "generate", run_generate, "continue a text")
    _add_model(command, "causal LM")
    _add_texts(command)
    command.description = 'Continue each text with a causal LM: minilm generate DIR "Once upon a time" --top-p 0.95'
    command.add_argument(
        "--chat",
        nargs="*",
        metavar="TEXT",
        help="answer each text as the message of a user, by the chat template of the tokenizer",
    )
    command.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="maximum number of new tokens (default: 100, or as many as the model has room for)",
    )
    command.add_argument(
        "--temperature",
        type=_not_negative,
        default=1.0,
        metavar="T",
        help="below 1 likely tokens become likelier; 0 always takes the likeliest (default: 1)",
    )
    command.add_argument(
        "--top-k",
        type=_whole,
        default=50,
        metavar="K",
        help="draw from the K likeliest tokens (default: 50; 0: from all)",
    )
    command.add_argument(
        "--top-p",
        type=_probability,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that together have probability P (default: 1)",
    )
    command.add_argument(
        "--seed",
        type=_whole,
        default=0,
        metavar="S",
        help="seed of the draws; another seed gives another text (default: 0)",
    )


def _add_classify(commands: Any) -> None:
    command = _add_command(commands, "classify", run_classify, "the class of a text or a pair")
    _add_model(command, "sequence classifier")
    _add_texts(command)
    command.description = (
        'Print the class of each text: minilm classify DIR "Great fun!"; --pair TEXT adds a second text.'
    )
    command.add_argument("--pair", metavar="TEXT", help="second text of a pair")
    command.add_argument("--pair-column", metavar="NAME", help="column of --file that holds the second text")
    command.add_argument(
        "--top-k", type=_positive, default=1, metavar="K", help="number of labels to print, best first (default: 1)"
    )


def _add_embed(commands: Any) -> None:
    command = _add_command(commands, "embed", run_embed, "how near texts are, or their embeddings")
    _add_model(command, "sentence embedding model")
    _add_texts(command)
    command.description = (
        'Print the cosine of each text with each other one: minilm embed DIR "A dog barks." "A cat purrs."; --json '
        "prints the embedding of each text."
    )
    command.add_argument(
        "--pooling",
        choices=("mean", "first", "last"),
        help="how hidden states become an embedding (default: as the folder says)",
    )


def _add_answer(commands: Any) -> None:
    command = _add_command(commands, "answer", run_answer, "the answer to a question in a text")
    _add_model(command, "model for question answering")
    _add_texts(command)
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
        "--max-answer", type=_positive, default=30, metavar="N", help="maximum tokens of an answer (default: 30)"
    )
    command.add_argument(
        "--top-k", type=_positive, default=1, metavar="K", help="number of answers to print, best first (default: 1)"
    )


def _add_tag(commands: Any) -> None:
    command = _add_command(commands, "tag", run_tag, "the tagged spans of a text, such as its names")
    _add_model(command, "token classifier")
    _add_texts(command)
    command.description = 'Find the spans of words in each text whose tag is not O: minilm tag DIR "Ada lives in Rome."'
    command.add_argument(
        "--strategy",
        choices=("none", "simple", "first", "average", "max"),
        default="first",
        help="how tokens give spans, as aggregation_strategy of transformers' pipeline (default: first)",
    )


def _add_evaluate(commands: Any) -> None:
    command = _add_command(commands, "evaluate", run_evaluate, "loss, perplexity, accuracy, … on data of your own")
    command.description = (
        "Evaluate a model as training does: minilm evaluate DIR --data.source FILE. Without --data.source, repeat the "
        "evaluation of the run whose folder DIR is."
    )
    command.epilog = "--data.column, --data.pair-column, --data.label-column, … mean what they mean for a recipe."
    _add_model(command, "model of any of these kinds")


def _add_compare(commands: Any) -> None:
    command = _add_command(commands, "compare", run_compare, "whether one of two models is better, and by how much")
    command.description = (
        "Print the difference of two models on the same evaluation examples, B minus A, with half of its 95% interval "
        "and its p-value: minilm compare out/a out/b. The figures are those of the ledgers of the runs. With "
        "--data.source, both models are evaluated on other data."
    )
    command.epilog = "--data.column, --data.pair-column, --data.label-column, … mean what they mean for a recipe."
    command.add_argument("first", metavar="A", help="folder of a run or a checkpoint, or a hub id")
    command.add_argument("second", metavar="B", help="the same")
    _add_json(command)


def _add_ledger(commands: Any) -> None:
    command = _add_command(commands, "ledger", run_ledger, "the evaluation examples with the highest losses")
    command.description = (
        "List the evaluation examples of a run with the highest losses in its last evaluation: minilm ledger out/a. "
        "The column `high in` has the number of evaluations in which an example is among the highest tenth."
    )
    command.add_argument("run", metavar="RUN", help="output folder of a run, finished or not")
    command.add_argument(
        "--top", type=_positive, default=10, metavar="N", help="number of examples to list, highest first (default: 10)"
    )
    command.add_argument(
        "--always-high",
        action="store_true",
        help="list only examples that are among the highest tenth in each evaluation, or in each epoch",
    )
    command.add_argument(
        "--train",
        action="store_true",
        help="list training examples by their last loss; needs --run.train-ledger",
    )
    command.add_argument(
        "--duplicates",
        action="store_true",
        help="with --train: list near-duplicates of earlier examples, among the tenth with the lowest losses",
    )
    _add_json(command)


def _add_export(commands: Any) -> None:
    command = _add_command(commands, "export", run_export, "write the model alone, as safetensors or ONNX")
    command.description = (
        "Write the model of a run or of a checkpoint, with its tokenizer and nothing else, to a new folder: "
        "minilm export DIR --format onnx --output FOLDER"
    )
    command.add_argument("model", metavar="DIR", help="folder of a run or of a checkpoint")
    command.add_argument(
        "--format",
        choices=("onnx", "safetensors"),
        required=True,
        help='safetensors as the run wrote it, or ONNX (pip install "minilm[onnx]")',
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to, new or empty")


def _add_branch(commands: Any) -> None:
    command = _add_command(commands, "branch", run_branch, "continue a checkpoint of a run as another run")
    command.description = (
        "Start a new run from a checkpoint of another one, with its settings and the flags that follow: minilm branch "
        "out/a --at 8000 --run.max-steps 10000 --optim.decay 2000 --run.output-dir out/b. The other run stays as it "
        "is. minilm refuses settings that would have changed a step before the checkpoint. --run.resume latest resumes "
        "a branch that was stopped."
    )
    command.epilog = (
        "docs/flags.md lists the flags of runs. On several processes: accelerate launch --multi_gpu --num_processes 8 "
        "-m minilm.commands.main branch …"
    )
    command.add_argument("folder", metavar="RUN", help="output folder of a run, finished or not")
    command.add_argument(
        "--at", type=_positive, required=True, metavar="STEP", help="step of the checkpoint to start from"
    )


def _add_verify(commands: Any) -> None:
    command = _add_command(commands, "verify", run_verify, "make steps of a run again, and compare every bit")
    command.description = (
        "Make the steps of a run between two of its checkpoints again, in a temporary folder, and compare the weights, "
        "the optimizer state and the losses with the run's: minilm verify out/a --windows 3. If all are equal, the "
        "model card says so."
    )
    command.epilog = "The exit status is 1 if something differs."
    command.add_argument("folder", metavar="RUN", help="output folder of a run, finished or not")
    command.add_argument(
        "--windows",
        type=_positive,
        default=3,
        metavar="N",
        help="number of stretches between two checkpoints, chosen at random (default: 3)",
    )


def _add_replay(commands: Any) -> None:
    command = _add_command(commands, "replay", run_replay, "what some training documents contributed to a run")
    command.description = (
        "Run again without the loss of some training documents, and compare the evaluation with the run's: minilm "
        "replay out/a --without 3,17,40-45. All else stays as it was. The replay begins at the last checkpoint before "
        "the documents were first read, and is written to RUN-without, or to --run.output-dir."
    )
    command.epilog = (
        "--run.resume latest resumes a replay that was stopped. On several processes: accelerate launch --multi_gpu "
        "--num_processes 8 -m minilm.commands.main replay …"
    )
    command.add_argument("folder", metavar="RUN", help="output folder of a finished run")
    command.add_argument(
        "--without",
        required=True,
        metavar="DOCUMENTS",
        help="numbers of training documents, from 0, such as 3,17,40-45; or a file of numbers or texts, one a line",
    )


def _add_merge(commands: Any) -> None:
    command = _add_command(commands, "merge", run_merge, "average the weights of several models")
    command.description = (
        "Write a model whose weights are the mean of those of several checkpoints or runs of the same model: minilm "
        "merge out/a/checkpoint-1000 out/a/checkpoint-2000 --output out/merged"
    )
    command.add_argument("models", metavar="DIR", nargs="+", help="folder of a run or of a checkpoint")
    command.add_argument("--output", required=True, metavar="FOLDER", help="folder to write to, new or empty")
    command.add_argument(
        "--weights",
        type=_not_negative,
        nargs="+",
        metavar="W",
        help="share of each model in the mean, in any unit (default: equal shares)",
    )


def _add_tokenize(commands: Any) -> None:
    command = _add_command(commands, "tokenize", run_tokenize, "write the tokens of text, to train on them later")
    command.description = (
        "Write the tokens of text to a folder: minilm tokenize TEXT.parquet --tokenizer gpt2 --output DIR. The recipe "
        "then takes --data.source DIR. The same command again continues where it stopped."
    )
    command.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder, glob or saved dataset")
    command.add_argument("--tokenizer", required=True, metavar="MODEL", help="hub id or folder of a tokenizer")
    command.add_argument("--output", type=Path, required=True, metavar="OUT", help="folder for the tokens")
    command.add_argument("--column", default="text", metavar="NAME", help="column of the text (default: text)")
    command.add_argument(
        "--document", choices=("line", "paragraph"), default="line", help="what a document of a .txt file is"
    )
    command.add_argument(
        "--eval-fraction",
        type=_probability,
        default=0.05,
        metavar="P",
        help="largest data.eval_fraction of later runs, whose texts are stored too (default: 0.05)",
    )
    command.add_argument("--words", action="store_true", help="store where words begin, to mask words or spans")
    command.add_argument(
        "--processes", type=_positive, default=1, metavar="N", help="number of processes, at most one for each file"
    )


def _add_suite(commands: Any) -> None:
    command = _add_command(commands, "suite", run_suite, "fine-tune a model on GLUE or SuperGLUE, and print the table")
    command.description = (
        "Fine-tune a model on each task with each learning rate and seed, side by side, and print a table: minilm "
        "suite bert-base-uncased --data glue_data. The table has the figures of each benchmark, at the rate whose "
        "median over the seeds is the highest on the validation set: their median over the seeds, with the lowest and "
        "the highest value, and the average without WNLI. The output folder also gets it as table.md, table.tex and "
        "suite.json. The same command continues a suite that was stopped or killed, and does nothing if all is done."
    )
    command.epilog = (
        "Other flags are those of recipes/classify.py, for all runs: --run.epochs 10 --batch.max-length 256. The "
        f"tasks are {', '.join(TASKS)}."
    )
    command.add_argument("model", metavar="DIR", help="folder or hub id of a checkpoint to fine-tune")
    command.add_argument(
        "--tasks",
        nargs="+",
        default=["glue"],
        metavar="TASK",
        help="tasks, or glue or superglue for all tasks of a benchmark (default: glue)",
    )
    command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders with the original downloads, such as CoLA/train.tsv and BoolQ/train.jsonl (default: the hub's "
        "nyu-mll/glue and aps/super_glue)",
    )
    command.add_argument(
        "--rates",
        type=_positive_number,
        nargs="+",
        default=[2e-5, 3e-5, 5e-5],
        metavar="LR",
        help="learning rates to try on each task (default: 2e-5 3e-5 5e-5)",
    )
    command.add_argument(
        "--seeds", type=_whole, nargs="+", default=[0, 1, 2], metavar="S", help="seeds of each rate (default: 0 1 2)"
    )
    command.add_argument(
        "--output", metavar="FOLDER", help="folder to write to or to continue (default: out/suite-DIR)"
    )
    command.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="runs side by side, which share the processors (default: as many as the processors and the memory allow, "
        "or one for each GPU)",
    )
    command.add_argument(
        "--keep-models",
        action="store_true",
        help="keep the model of each run (default: keep its figures, log and ledger; its run.json repeats it)",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="list the runs with their steps and estimated times, and write nothing"
    )


def _add_report(commands: Any) -> None:
    command = _add_command(commands, "report", run_report, "curves, settings and results of runs as one page")
    command.description = (
        "Write one HTML page about one or several runs, for a browser without network: minilm report out/a out/b"
    )
    command.add_argument(
        "folders", metavar="OUT", nargs="+", help="output folder of a run, finished or not, or a folder of such folders"
    )
    command.add_argument("--output", default="report.html", metavar="FILE", help="file to write (default: report.html)")
    command.add_argument("--png", action="store_true", help="also write the curves as a picture (needs matplotlib)")
    command.add_argument(
        "--live",
        action="store_true",
        help="write the page again every 5 seconds, and let it reload, until the runs end",
    )


def _add_doctor(commands: Any) -> None:
    command = _add_command(commands, "doctor", run_doctor, "check this machine, and say what to fix")
    command.description = (
        "Check hardware, precision, memory, threads, versions, caches, and whether two processes can connect. Print a "
        "line about each."
    )
    command.epilog = "The exit status is 1 if there is something to fix."
    _add_json(command)


def _add_texts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "texts",
        metavar="TEXT",
        nargs="*",
        help="a text; none or - reads standard input, where each line is a text, even a blank one, numbered from 0",
    )
    command.add_argument(
        "--file",
        metavar="FILE",
        help="read the texts from a file, where each row (.txt: line) is a text, even a blank one, numbered from 0",
    )
    command.add_argument("--column", metavar="NAME", help="column of --file (default: text)")
    command.add_argument("--delimiter", metavar="CHARACTER", help="character between the fields of a .csv file")


def _add_model(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument("model", metavar="DIR", help=f"folder or hub id of a {kind}")
    _add_json(command)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON objects, one per line, for programs")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _positive_number(text: str) -> float:
    number = _not_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive number")
    return number


def _probability(text: str) -> float:
    number = _not_negative(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie in (0, 1]")
    return number


if __name__ == "__main__":
    main()
