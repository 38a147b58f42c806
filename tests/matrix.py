"""Every architecture of transformers under minilm: `python -m tests.matrix --only bert,gpt2 --head masked`.

For each type that has the head, a tiny model is saved and loaded like any checkpoint. It takes one step on examples of
different lengths, once as one micro-batch and once as three. Its loss and gradients are compared with a reference: the
plain model reads one row at a time, and the cross entropy is computed in float64. The loss of HF Trainer on the same
micro-batches is compared with it too. Each model runs in its own process, with a time limit. At the end comes the table
of docs/models.md.

Axes: T tokens of all rows, L tokens of a row, R rows, G distributions of an example, C classes.
"""

import argparse
import contextlib
import inspect
import json
import logging
import math
import os
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from minilm import CausalLM, Classification, MaskedLM, Model, MultipleChoice, QuestionAnswering, TokenClassification
from minilm.config import ObjectiveSettings
from minilm.data.corpus import Examples, PreparedData
from minilm.data.labels import Labels
from minilm.data.micro_batch import MicroBatch
from minilm.data.special_ids import PADDING_FIELDS
from minilm.data.tokenizer_training import train_tokenizer
from minilm.distributed.flops import count_flops
from minilm.models.head import Head, freeze_unused
from minilm.models.loading import load_model
from minilm.objectives.factory import build_objective
from minilm.objectives.objective import Objective
from minilm.train import train_step
from tests.reference import NO_EXAMPLES, pad_rows
from tests.tiny import tiny_config

LENGTHS = (30, 17, 17, 12, 5, 2, 1)
CUTS = ((range(7),), (range(1), range(1, 4), range(4, 7)))  # a step as one micro-batch, and as three
# The tokens of each of two choices.
PAIRS = tuple(zip(LENGTHS, reversed(LENGTHS), strict=True))
LONGEST, VOCABULARY, LIMIT = 32, 300, 120  # tokens, tokens, seconds of a processor
TOLERANCE, GRADIENT = 1e-5, 1e-4  # relative; the second for float32 sums over the tokens in another order
NO_TARGET = -100
SHORTCUTS = ("sparse", "padding_free", "needs_equal_lengths", "fused")
Gradients = dict[str, Tensor]
IntegerArray = NDArray[np.int64]
LABELS = Labels(problem="single-label", names=("no", "yes", "maybe"))


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example, as the plain model and Trainer read it."""

    rows: Sequence[Tensor]
    """int64[L], the token ids of its row, or of each choice."""
    targets: Tensor
    """int64, the class of each distribution that the model gives for the example, or NO_TARGET."""
    labels: dict[str, Tensor]
    """int64, the arguments with which a model of transformers computes its loss: scalars, or a value for each token."""


def masked_examples(batch: MicroBatch) -> list[Example]:
    """Return the rows of a batch, with the targets of their tokens that the collator gave."""
    targets_T = torch.full_like(batch.input_ids_T, NO_TARGET)
    targets_T[batch.target_index_N] = batch.target_ids_N
    rows = zip(split_rows(batch), targets_T.split([*batch.packing.lengths]), strict=True)
    return [Example(rows=[ids_L], targets=targets_L, labels={"labels": targets_L}) for ids_L, targets_L in rows]


def causal_examples(batch: MicroBatch) -> list[Example]:
    """Return the rows of a batch, where the target of each token is the next one."""
    return [
        Example(rows=[ids_L], targets=F.pad(ids_L[1:], (0, 1), value=NO_TARGET), labels={"labels": ids_L})
        for ids_L in split_rows(batch)
    ]


def classification_examples(batch: MicroBatch) -> list[Example]:
    """Return the rows of a batch, each with its class."""
    rows = zip(split_rows(batch), batch.target_ids_N, strict=True)
    return [Example(rows=[ids_L], targets=label[None], labels={"labels": label}) for ids_L, label in rows]


def answer_examples(batch: MicroBatch) -> list[Example]:
    """Return the rows of a batch. The classes are the places of a row, and the answer starts and ends at one."""
    rows = zip(split_rows(batch), batch.target_ids_N, strict=True)
    return [
        Example(rows=[ids_L], targets=places, labels={"start_positions": places[0], "end_positions": places[1]})
        for ids_L, places in rows
    ]


def choice_examples(batch: MicroBatch) -> list[Example]:
    """Return the pairs of rows of a batch, each with the number of the right one."""
    rows = split_rows(batch)
    pairs = zip(rows[::2], rows[1::2], batch.target_ids_N, strict=True)
    return [Example(rows=pair, targets=right[None], labels={"labels": right}) for *pair, right in pairs]


def split_rows(batch: MicroBatch) -> Sequence[Tensor]:
    return batch.input_ids_T.split([*batch.packing.lengths])


def tag_tokens(ids_T: IntegerArray) -> dict[str, Any]:
    """Return a class for about half of the tokens."""
    classes_T = ids_T % (2 * len(LABELS.names))
    return {"token_targets": np.where(classes_T < len(LABELS.names), classes_T, NO_TARGET).astype(np.int32)}


def mark_answers(ids_T: IntegerArray) -> dict[str, Any]:
    """Return an answer in each row that ends at its last token."""
    lengths_E = np.array(LENGTHS)
    return {"labels": np.stack([lengths_E // 3, lengths_E - 1], 1)}


def pair_choices(ids_T: IntegerArray) -> dict[str, Any]:
    """Return the rows of examples of two choices, and the right ones."""
    bounds_R1 = np.cumsum([0, *chain.from_iterable(PAIRS)])
    return {"rows": (bounds_R1, 2 * np.arange(len(PAIRS) + 1)), "labels": np.array([0, 1, 1, 0, 0, 1, 1])}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A head: the objective that trains it, and the targets of its examples."""

    title: str
    settings: ObjectiveSettings
    examples: Callable[[MicroBatch], list[Example]]
    """Splits a batch into its examples."""
    targets: Callable[[IntegerArray], dict[str, Any]] = lambda ids_T: {}
    """Returns the fields of `Examples` that hold the targets, for the ids of all rows."""
    lengths: Sequence[Sequence[int]] = tuple((length,) for length in LENGTHS)
    """The number of tokens of each row of each example."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration that the data decide."""
    labels: Labels | None = None
    shortcuts: tuple[str, ...] = ("padding_free",)
    """The shortcuts that can save work under this head."""
    is_language_model: bool = False


# To test another head, add an entry here.
HEADS = {
    "masked": Kind(
        title="masked LM",
        settings=MaskedLM(rate=0.4),
        examples=masked_examples,
        shortcuts=("sparse", "padding_free", "fused"),
        is_language_model=True,
    ),
    "causal": Kind(
        title="causal LM",
        settings=CausalLM(),
        examples=causal_examples,
        shortcuts=("sparse", "padding_free", "fused"),
        is_language_model=True,
    ),
    "classification": Kind(
        title="classification",
        settings=Classification(),
        examples=classification_examples,
        targets=lambda ids_T: {"labels": np.array([0, 2, 1, 1, 0, 2, 1])},
        fields=LABELS.fields(),
        labels=LABELS,
    ),
    "token-classification": Kind(
        title="token classification",
        settings=TokenClassification(),
        examples=masked_examples,
        targets=tag_tokens,
        fields={name: value for name, value in LABELS.fields().items() if name != "problem_type"},
        shortcuts=("sparse", "padding_free"),
    ),
    "question-answering": Kind(
        title="question answering",
        settings=QuestionAnswering(),
        examples=answer_examples,
        targets=mark_answers,
    ),
    "multiple-choice": Kind(
        title="multiple choice",
        settings=MultipleChoice(),
        examples=choice_examples,
        targets=pair_choices,
        lengths=PAIRS,
    ),
}


@dataclass(kw_only=True)
class Result:
    """The result for one model type with one head."""

    head: str
    kind: str
    built: bool = False
    why: str = ""
    """Why the model was not built, was refused, or failed."""
    refused: bool = False
    """Whether it was refused before training, with an error of one line."""
    decoder: bool = False
    """Whether the model was refused without `is_decoder`, and measured with it."""
    measured: bool = False
    loss: float = np.inf
    """The largest relative difference of the loss from the reference."""
    gradient: float = np.inf
    """The same of a parameter's gradient."""
    shortcuts: dict[str, bool] = field(default_factory=dict)
    reason: str = ""
    special: dict[str, str] = field(default_factory=dict)
    """For each of the SITUATIONS: `equal`, `refused` before training, or the fault."""
    trainer: str = ""
    """`right`, or the ratio of Trainer's loss to the right one with one and with three micro-batches, or its error."""

    @property
    def equal(self) -> bool:
        return self.measured and self.loss <= TOLERANCE and self.gradient <= GRADIENT


def measure(head: str, kind: str) -> Result:
    """Build a model, load it, train one step and compare. Errors are stored in the result."""
    result = Result(head=head, kind=kind)
    try:
        attempt(result)
        if result.decoder:
            attempt(result)
    except Exception as error:  # of a configuration that cannot even be made by default
        result.why = f"not built: {quote(error)}"
    return result


def attempt(result: Result) -> None:
    """Fill in the result. If `result.decoder` is set, measure the model with `is_decoder`."""
    kind, tokenizer = HEADS[result.head], tokenizer_for(result.head, result.kind)
    objective, examples = build_objective(kind.settings), examples_of(result.head, rows_of(result.head, tokenizer))
    prepared = prepare(result.head, tokenizer, examples)
    step = "not built"
    try:
        torch.manual_seed(0)
        config = tiny_config(result.kind, tokenizer, decoder=result.decoder)
        text = AutoConfig.for_model(result.kind).get_text_config()
        if (
            not kind.is_language_model
            and tokenizer.pad_token_id == tokenizer.eos_token_id
            and text.pad_token_id is None
        ):
            config.get_text_config().pad_token_id = None  # as its checkpoints come
        model = objective.auto.from_config(config).eval()
        with torch.no_grad():
            # Two texts as RoBERTa joins them. Longformer finds a question by the separators.
            end = getattr(config, "eos_token_id", None) or 7
            ids_1xL = torch.tensor([[7, end, end, 7, end]])
            model(input_ids=ids_1xL if len(kind.lengths[0]) == 1 else ids_1xL[None])
        result.built, step = True, "not saved"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            step = "not loaded"
            objective.auto.from_pretrained(folder)
            step = "refused"
            network = load_checked(folder, tokenizer, objective, prepared)
            plain, head = deepcopy(network).train(), objective.head(network, prepared)
            freeze_unused(head)
            count_flops(head, LONGEST)
        step = "fails"
        compare(result, head.train(), plain, prepared)
        for situation in SITUATIONS:
            result.special[situation] = try_special_ids(result, situation)
    except Exception as error:
        known = type(error) is ValueError and "\n" not in str(error)
        result.refused |= step == "refused" and known
        result.decoder |= "is_decoder" in str(error).replace("-", "_")
        result.why = f"{step if result.refused or step != 'refused' else 'fails'}: {quote(error)}"


def prepare(head: str, tokenizer: PreTrainedTokenizerBase, examples: Examples) -> PreparedData:
    """Return the examples as a run has them."""
    kind = HEADS[head]
    return PreparedData(
        tokenizer=tokenizer, train=examples, eval=examples, labels=kind.labels, fields=dict(kind.fields)
    )


def compare(result: Result, head: Head, plain: PreTrainedModel, prepared: PreparedData) -> None:
    """Compare minilm's loss and gradients, and Trainer's loss, with the reference."""
    kind = HEADS[result.head]
    objective = build_objective(kind.settings)
    examples = kind.examples(collate(objective, prepared, range(len(LENGTHS)), padded=False))
    expected, gradients = reference(plain, examples)
    result.trainer = trainers(plain, examples, expected)
    result.shortcuts = {name: bool(getattr(head, name)) for name in SHORTCUTS if hasattr(head, name)}
    result.reason = getattr(head, "reason", "")
    result.loss, result.gradient = compare_update(head, objective, prepared, expected, gradients)
    result.measured = True


def load_checked(
    folder: str, tokenizer: PreTrainedTokenizerBase, objective: Objective, prepared: PreparedData
) -> PreTrainedModel:
    """Load a model and check it, as a run does."""
    network = load_model(
        Model(name=folder), tokenizer, max_length=LONGEST, seed=0, auto=objective.auto, fields=prepared.fields
    )
    objective.check(network, tokenizer, ())
    return network


def collate(objective: Objective, prepared: PreparedData, ids: Sequence[int], *, padded: bool) -> MicroBatch:
    """Return a micro-batch of these examples."""
    collator = objective.collator(prepared.tokenizer, prepared.train, seed=0, padded=padded, multiple=1)
    return collator([prepared.train[i] for i in ids], np.array(ids), 0)


def compare_update(
    head: Head, objective: Objective, prepared: PreparedData, expected: float, gradients: Gradients
) -> tuple[float, float]:
    """Return the largest relative differences of minilm's loss and gradients from the reference's, over all CUTS."""
    losses, errors = [], []
    for cut in CUTS:
        batches = [collate(objective, prepared, part, padded=not head.padding_free) for part in cut]
        loss, ours = update(head, batches)
        losses.append(abs(loss - expected) / expected)
        errors.append(gradient_error(ours, gradients))
    # np.max keeps a NaN, which max may drop.
    return float(np.max(losses)), float(np.max(errors))


def try_special_ids(result: Result, situation: str) -> str:
    """Return how a model does in one of the SITUATIONS: `equal`, `refused` before training, or the fault."""
    kind, tokenizer = HEADS[result.head], tokenizer_for(result.head, result.kind)
    objective, changed, rows = build_objective(kind.settings), *SITUATIONS[situation](result.head, tokenizer)
    prepared = prepare(result.head, tokenizer, examples_of(result.head, rows))
    config = tiny_config(result.kind, tokenizer, decoder=result.decoder)
    for part in (config, config.get_text_config()):
        for name, id in changed.items():
            if name in part.to_dict():
                setattr(part, name, id)
    step = "not built"
    try:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            objective.auto.from_config(config).save_pretrained(folder)
            step = "refused"
            network = load_checked(folder, tokenizer, objective, prepared)
        plain, head = deepcopy(network).train(), objective.head(network, prepared).train()
        freeze_unused(head)
        step = "fails"
        examples = kind.examples(collate(objective, prepared, range(len(LENGTHS)), padded=False))
        expected, gradients = reference(plain, examples)
        loss, gradient = compare_update(head, objective, prepared, expected, gradients)
    except Exception as error:
        if step == "refused" and type(error) is ValueError and "\n" not in str(error):
            return "refused"
        return f"{step if step != 'refused' else 'fails'}: {quote(error)}"
    if loss <= TOLERANCE and gradient <= GRADIENT:
        return "equal"
    return f"WRONG: loss {loss:.1e}, gradients {gradient:.1e}"


def examples_of(head: str, rows: Sequence[Any]) -> Examples:
    """Return a corpus of examples, whose ids are these, with the targets of the head."""
    ids_T, ends = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
    return replace(NO_EXAMPLES, ids=ids_T, start=ends[:-1], stop=ends[1:], **HEADS[head].targets(ids_T))


def _with_special(head: str, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], list[Any]]:
    rows = [row.copy() for row in rows_of(head, tokenizer)]
    for row in rows[:4]:
        row[2 : 2 + len(tokenizer.all_special_ids)] = tokenizer.all_special_ids
    rows[4][1] = tokenizer.pad_token_id
    return {}, rows


def _with_other_padding(head: str, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], list[Any]]:
    rows = [row.copy() for row in rows_of(head, tokenizer)]
    for row in rows[:5]:
        row[[0, 2]] = _OTHER
    return dict.fromkeys(PADDING_FIELDS, _OTHER), rows


def _without_end(head: str, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, int], list[Any]]:
    rows = [row.copy() for row in rows_of(head, tokenizer)]
    for row in rows:
        row[-1] = 9
    return {}, rows


_OTHER = 7  # an id that texts hold
# What changes in a checkpoint's configuration, and the rows.
SITUATIONS: dict[str, Callable[[str, PreTrainedTokenizerBase], tuple[dict[str, int], list[Any]]]] = {
    "each special token in texts": _with_special,
    "another padding id": _with_other_padding,
    "no end token": _without_end,
}


def reference(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[float, Gradients]:
    """Return the mean cross entropy of the targets in float64, and its gradients, from a forward of each row alone."""
    targets = sum(int((example.targets != NO_TARGET).sum()) for example in examples)
    total = 0.0
    model.zero_grad()
    for example in examples:
        logits_GxC = read_logits(model, example.rows)[: len(example.targets)].double()
        log_p_GxC = logits_GxC - logits_GxC.logsumexp(-1, keepdim=True)
        chosen_G = log_p_GxC.gather(1, example.targets.clamp(min=0)[:, None])[:, 0]
        loss = -(chosen_G * (example.targets != NO_TARGET)).sum() / targets
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def read_logits(model: PreTrainedModel, rows: Sequence[Tensor]) -> Tensor:
    """Return the logits of an example, G x C, from a forward of each of its rows alone. Several rows are choices."""
    takes = inspect.signature(model.forward).parameters
    words = {"use_cache": False} if "use_cache" in takes else {}
    logits = []
    for ids_L in rows:
        ids = ids_L.view(1, 1, -1) if len(rows) > 1 else ids_L[None]
        # As tokenizers give it: without a mask XLM takes any token of padding's id for padding.
        mask = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {}
        output = model(input_ids=ids, **mask, **words)
        if "start_logits" in output:
            return torch.cat([output.start_logits, output.end_logits])
        logits.append(output.logits)
    logits_1xGxC = torch.cat(logits, -1)
    return logits_1xGxC.reshape(-1, logits_1xGxC.shape[-1])


def update(head: Head, batches: Sequence[MicroBatch]) -> tuple[float, Gradients]:
    """Return the loss and the gradients of one `train_step` with a learning rate of 0."""
    gradients: Gradients = {}

    def keep(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in head.model.named_parameters() if p.grad is not None})

    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.0, fused=True)
    optimizer.register_step_pre_hook(keep)
    step = train_step(Accelerator(cpu=True), head, optimizer, batches, lr=0.0, max_grad_norm=0.0)
    return step.loss.item(), gradients


def gradient_error(ours: Gradients, expected: Gradients) -> float:
    """Return the largest relative difference. The scale is at least a tenth of the largest gradient.

    Where the plain model's gradient of a parameter is not finite (Gemma 4 divides by the norm of padding's row of
    zeros), ours must not be finite either; the others are compared.
    """
    none = torch.zeros(())
    pairs = [(ours.get(name, none), expected.get(name, none)) for name in expected.keys() | ours.keys()]
    if any(bool(own.isfinite().all()) != bool(plain.isfinite().all()) for own, plain in pairs):
        return math.inf
    pairs = [(own, plain) for own, plain in pairs if plain.isfinite().all()]
    largest = max((float(plain.norm()) for _, plain in pairs), default=0.0)
    return max(
        (float((own - plain).norm()) / (float(plain.norm()) + 0.1 * largest) for own, plain in pairs), default=0.0
    )


def trainers(model: PreTrainedModel, examples: Sequence[Example], expected: float) -> str:
    """Compare HF Trainer's loss with the expected one: return `right`, their ratio, or Trainer's error."""
    ratios = []
    try:
        for cut in CUTS:
            with tempfile.TemporaryDirectory() as folder:
                asked = TrainingArguments(folder, use_cpu=True, report_to=[], gradient_accumulation_steps=len(cut))
                trainer = Trainer(model=model, args=asked)
                trainer.current_gradient_accumulation_steps = len(cut)
                batches = iter([padded(model, [examples[i] for i in part]) for part in cut])
                inputs, items = trainer.get_batch_samples(batches, len(cut), torch.device("cpu"))
                ratios.append(sum(trainer.training_step(model, part, items).item() for part in inputs) / expected)
    except Exception as error:
        return f"fails: {quote(error)}"
    if all(abs(ratio - 1) <= TOLERANCE for ratio in ratios):
        return "right"
    return " and ".join(f"{ratio:.3g}" if abs(ratio - 1) > 0.005 else f"1{ratio - 1:+.0e}" for ratio in ratios)


def padded(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return a micro-batch as a collator of transformers makes it: padded, with a mask if the model takes one."""
    rows = [ids_L for example in examples for ids_L in example.rows]
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids_RxL, mask_RxL = pad_rows(torch.cat(rows), [*map(len, rows)], padding)
    shape = (len(examples), -1, ids_RxL.shape[1]) if len(rows) > len(examples) else ids_RxL.shape
    inputs = {"input_ids": ids_RxL.view(shape), "attention_mask": mask_RxL.view(shape)}
    for name in examples[0].labels:
        labels = [example.labels[name] for example in examples]
        inputs[name] = (
            torch.stack(labels)
            if labels[0].dim() == 0
            else pad_rows(torch.cat(labels), [*map(len, labels)], NO_TARGET)[0]
        )
    return {name: x for name, x in inputs.items() if name in inspect.signature(model.forward).parameters}


def tokenizer_for(head: str, kind: str) -> PreTrainedTokenizerBase:
    """Return a small tokenizer. For a decoder, it pads with the token that ends texts."""
    decoder = kind not in types_of("masked") and not AutoConfig.for_model(kind).is_encoder_decoder
    return _tokenizer(head == "causal" or (head != "masked" and decoder and kind in types_of("causal")))


@cache
def _tokenizer(causal: bool) -> PreTrainedTokenizerBase:
    documents = Dataset.from_dict({"text": [f"{i} and {i * i} make {i + i * i}, all told." for i in range(200)]})
    return train_tokenizer(documents, "bpe", VOCABULARY, causal=causal)


def rows_of(head: str, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return the ids of random examples. Except for a language model, each row ends with the token that ends texts."""
    lengths = HEADS[head].lengths
    ends = np.cumsum([*chain.from_iterable(lengths)])
    ids_T = np.random.default_rng(0).integers(5, len(tokenizer), ends[-1])
    if not HEADS[head].is_language_model and tokenizer.sep_token_id is not None:
        ids_T[ends - 1] = tokenizer.sep_token_id
    return np.split(ids_T, np.cumsum([*map(sum, lengths)])[:-1])


def quote(error: BaseException) -> str:
    """Return the class and the message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def measure_in_process(head: str, kind: str) -> Result:
    """Return the result of `measure` in another process, for at most LIMIT seconds of processor time."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
        signal.alarm(10 * LIMIT)
        with contextlib.suppress(BaseException), os.fdopen(write, "w") as pipe:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            pipe.write(json.dumps(asdict(measure(head, kind))))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if told:
        return Result(**json.loads(told))
    why = f"no end in {LIMIT} s" if ended in (-signal.SIGALRM, -signal.SIGXCPU) else f"its process died ({ended})"
    return Result(head=head, kind=kind, why=why)


def types_of(head: str) -> list[str]:
    """Return the model types of transformers that have this head."""
    return sorted(build_objective(HEADS[head].settings).auto._model_mapping._model_mapping)


def line(result: Result) -> str:
    """Return a row of the table."""
    if not result.measured:
        return f"{result.kind:26} {result.why[:200]}"
    equal = "equal" if result.equal else f"WRONG: loss {result.loss:.1e}, gradients {result.gradient:.1e}"
    head = {True: "sparse", False: "full", None: ""}[result.shortcuts.get("sparse")]
    layout = (
        "packed"
        if result.shortcuts["padding_free"]
        else "alone"
        if result.shortcuts["needs_equal_lengths"]
        else "padded"
    )
    fused = "fused" if result.shortcuts.get("fused") else ""
    notes = "; ".join(filter(None, ["with is_decoder=True" * result.decoder, result.reason[:100]]))
    odd = [f"{name}: {what[:80]}" for name, what in result.special.items() if what not in ("equal", "refused")]
    told = ", ".join(name for name, what in result.special.items() if what == "refused")
    special = "; ".join(odd) or f"special ids equal{f', refused: {told}' if told else ''}"
    return f"{result.kind:26} {equal:6} {head:6} {layout:6} {fused:5}  {special:17}  Trainer: " + (
        f"{result.trainer[:110]:22} {notes}"
    )


def summary(results: Sequence[Result]) -> dict[str, int | None]:
    """Return the counts of one head. None stands for a shortcut that cannot save work under it."""

    def count(name: str) -> int | None:
        useful = name in HEADS[results[0].head].shortcuts
        return sum(result.shortcuts.get(name, False) for result in results) if useful else None

    return {
        "types in transformers": len(results),
        "built at a tiny size": sum(result.built for result in results),
        "refused before training, as they come": sum(result.refused for result in results),
        "same loss and gradients as the plain model on single rows": sum(result.equal for result in results),
        "the same with special ids in and around the texts": sum(
            result.equal and bool(result.special) and {*result.special.values()} <= {"equal", "refused"}
            for result in results
        ),
        "head at the targets alone": count("sparse"),
        "packed, without padding": count("padding_free"),
        "loss in parts, without all logits in memory": count("fused"),
        "loss of HF Trainer right, in one micro-batch and in three": sum(
            result.trainer == "right" for result in results
        ),
    }


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Return the counts of all heads as the table of docs/models.md."""
    heads = [head for head in results if results[head]]
    counts = [summary(results[head]) for head in heads]
    lines = [f"| | {' | '.join(HEADS[head].title for head in heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in counts[0] if counts else ():
        cells = ("–" if count[name] is None else str(count[name]) for count in counts)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quiet() -> None:
    """Use one thread, and print only the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--head", choices=HEADS, default=None)
    asked = parser.parse_args()
    quiet()
    for causal in (False, True):  # before the processes
        _tokenizer(causal)
    only = set(filter(None, asked.only.split(",")))
    results: dict[str, list[Result]] = {}
    for head in [asked.head] if asked.head else HEADS:
        kinds = [kind for kind in types_of(head) if not only or kind in only]
        print(f"\n{head}", flush=True)
        results[head] = []
        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(partial(measure_in_process, head), kinds):
                print(line(result), flush=True)
                results[head].append(result)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
