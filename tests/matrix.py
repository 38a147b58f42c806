"""Every architecture of transformers under minilm: `python -m tests.matrix --only bert,gpt2 --head masked`.

For each type that has the head, a tiny model is saved and loaded like any checkpoint. It takes one step on rows of
different lengths, once as one micro-batch and once as three. Its loss and gradients are compared with a reference: the
plain model reads one row at a time, and the cross entropy is computed in float64. The loss of HF Trainer on the same
micro-batches is compared with it too. Each model runs in its own process, with a time limit.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from minilm import CausalLM, Classification, MaskedLM, Model
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
LONGEST, VOCABULARY, LIMIT = 32, 300, 120  # tokens, tokens, seconds of a processor
TOLERANCE, GRADIENT = 1e-5, 1e-4  # relative; the second for float32 sums over the tokens in another order
NO_TARGET = -100
SHORTCUTS = ("sparse", "padding_free", "needs_equal_lengths", "fused")
Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, as the plain model and Trainer read it."""

    input_ids_L: Tensor
    targets: Tensor
    """int64, the target of each logit, or NO_TARGET."""
    labels: Tensor
    """int64, the labels as a model of transformers takes them: a scalar for a row of a classification."""


def masked_examples(batch: MicroBatch, lengths: Sequence[int]) -> list[Example]:
    """Return the rows of a batch, with the targets that the collator chose."""
    targets_T = torch.full_like(batch.input_ids_T, NO_TARGET)
    targets_T[batch.target_index_N] = batch.target_ids_N
    rows = zip(batch.input_ids_T.split(list(lengths)), targets_T.split(list(lengths)), strict=True)
    return [Example(input_ids_L=ids_L, targets=targets_L, labels=targets_L) for ids_L, targets_L in rows]


def causal_examples(batch: MicroBatch, lengths: Sequence[int]) -> list[Example]:
    """Return the rows of a batch, where the target of each token is the next one."""
    rows = batch.input_ids_T.split(list(lengths))
    return [Example(input_ids_L=ids, targets=F.pad(ids[1:], (0, 1), value=NO_TARGET), labels=ids) for ids in rows]


def classification_examples(batch: MicroBatch, lengths: Sequence[int]) -> list[Example]:
    """Return the rows of a batch, each with its class."""
    rows = zip(batch.input_ids_T.split(list(lengths)), batch.target_ids_N, strict=True)
    return [Example(input_ids_L=ids_L, targets=label[None], labels=label) for ids_L, label in rows]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A head: the objective that trains it, and a function that splits a batch into its examples."""

    settings: MaskedLM | CausalLM | Classification
    examples: Callable[[MicroBatch, Sequence[int]], list[Example]]


# To test another head, add an entry here.
HEADS = {
    "masked": Kind(settings=MaskedLM(rate=0.4), examples=masked_examples),
    "causal": Kind(settings=CausalLM(), examples=causal_examples),
    "classification": Kind(settings=Classification(), examples=classification_examples),
}
LABELS = Labels(problem="single-label", names=("no", "yes", "maybe"))
EXAMPLES = replace(NO_EXAMPLES, labels=np.array([0, 2, 1, 1, 0, 2, 1]))


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
    objective, tokenizer = build_objective(HEADS[result.head].settings), tokenizer_for(result.head, result.kind)
    prepared = PreparedData(
        tokenizer=tokenizer,
        train=EXAMPLES,
        eval=EXAMPLES,
        labels=LABELS,
        fields=LABELS.fields() if result.head == "classification" else {},
    )
    step = "not built"
    try:
        torch.manual_seed(0)
        config = tiny_config(result.kind, tokenizer, decoder=result.decoder)
        text = AutoConfig.for_model(result.kind).get_text_config()
        if prepared.fields and tokenizer.pad_token_id == tokenizer.eos_token_id and text.pad_token_id is None:
            config.get_text_config().pad_token_id = None  # as its checkpoints come
        model = objective.auto.from_config(config).eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[7, 7, 7, 7, getattr(config, "eos_token_id", None) or 7]]))
        result.built, step = True, "not saved"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            step = "not loaded"
            objective.auto.from_pretrained(folder)
            step = "refused"
            network = load_model(
                Model(name=folder),
                tokenizer,
                max_length=LONGEST,
                seed=0,
                auto=objective.auto,
                fields=prepared.fields,
            )
            objective.check(network, tokenizer, ())
            plain, head = deepcopy(network).train(), objective.head(network, prepared)
            freeze_unused(head)
            count_flops(head, LONGEST)
        step = "fails"
        compare(result, head.train(), plain, tokenizer)
        for situation in SITUATIONS:
            result.special[situation] = try_special_ids(result, situation)
    except Exception as error:
        known = type(error) is ValueError and "\n" not in str(error)
        result.refused |= step == "refused" and known
        result.decoder |= "is_decoder" in str(error).replace("-", "_")
        result.why = f"{step if result.refused or step != 'refused' else 'fails'}: {quote(error)}"


def compare(result: Result, head: Head, plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare minilm's loss and gradients, and Trainer's loss, with the reference."""
    kind, rows = HEADS[result.head], rows_of(result.head, tokenizer)
    objective = build_objective(kind.settings)
    collate = objective.collator(tokenizer, EXAMPLES, seed=0, padded=False, multiple=1)
    examples = kind.examples(collate(rows, np.arange(len(rows)), 0), LENGTHS)
    expected, gradients = reference(plain, examples)
    result.trainer = trainers(plain, examples, expected)
    result.shortcuts = {name: bool(getattr(head, name)) for name in SHORTCUTS if hasattr(head, name)}
    result.reason = getattr(head, "reason", "")
    result.loss, result.gradient = compare_update(head, objective, tokenizer, rows, expected, gradients)
    result.measured = True


def compare_update(
    head: Head,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    expected: float,
    gradients: Gradients,
) -> tuple[float, float]:
    """Return the largest relative differences of minilm's loss and gradients from the reference's, over all CUTS."""
    collate = objective.collator(tokenizer, EXAMPLES, seed=0, padded=not head.padding_free, multiple=1)
    losses, errors = [], []
    for cut in CUTS:
        loss, ours = update(head, [collate([rows[i] for i in part], np.array(part), 0) for part in cut])
        losses.append(abs(loss - expected) / expected)
        errors.append(gradient_error(ours, gradients))
    # np.max keeps a NaN, which max may drop.
    return float(np.max(losses)), float(np.max(errors))


def try_special_ids(result: Result, situation: str) -> str:
    """Return how a model does in one of the SITUATIONS: `equal`, `refused` before training, or the fault."""
    kind, tokenizer = HEADS[result.head], tokenizer_for(result.head, result.kind)
    objective, changed, rows = build_objective(kind.settings), *SITUATIONS[situation](result.head, tokenizer)
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
            step, fields = "refused", LABELS.fields() if result.head == "classification" else {}
            model = Model(name=folder)
            network = load_model(model, tokenizer, max_length=LONGEST, seed=0, auto=objective.auto, fields=fields)
        objective.check(network, tokenizer, ())
        plain, examples = deepcopy(network).train(), examples_of(rows)
        prepared = PreparedData(tokenizer=tokenizer, train=examples, eval=examples, labels=LABELS, fields=fields)
        head = objective.head(network, prepared).train()
        freeze_unused(head)
        step = "fails"
        collate = objective.collator(tokenizer, EXAMPLES, seed=0, padded=False, multiple=1)
        expected, gradients = reference(plain, kind.examples(collate(rows, np.arange(len(rows)), 0), LENGTHS))
        loss, gradient = compare_update(head, objective, tokenizer, rows, expected, gradients)
    except Exception as error:
        if step == "refused" and type(error) is ValueError and "\n" not in str(error):
            return "refused"
        return f"{step if step != 'refused' else 'fails'}: {quote(error)}"
    if loss <= TOLERANCE and gradient <= GRADIENT:
        return "equal"
    return f"WRONG: loss {loss:.1e}, gradients {gradient:.1e}"


def examples_of(rows: Sequence[Any]) -> Examples:
    """Return a corpus that holds these rows."""
    ends = np.cumsum([0, *map(len, rows)])
    return replace(EXAMPLES, ids=np.concatenate(rows), start=ends[:-1], stop=ends[1:])


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
    takes = inspect.signature(model.forward).parameters
    words = {"use_cache": False} if "use_cache" in takes else {}
    targets = sum(int((example.targets != NO_TARGET).sum()) for example in examples)
    total = 0.0
    model.zero_grad()
    for example in examples:
        ids_1xL = example.input_ids_L[None]
        # As tokenizers give it: without a mask XLM takes any token of padding's id for padding.
        mask = {"attention_mask": torch.ones_like(ids_1xL)} if "attention_mask" in takes else {}
        logits = model(input_ids=ids_1xL, **mask, **words).logits
        logits_LxV = logits.reshape(-1, logits.shape[-1])[: example.targets.numel()].double()
        log_p_LxV = logits_LxV - logits_LxV.logsumexp(-1, keepdim=True)
        wanted_L = example.targets.reshape(-1)
        chosen_L = log_p_LxV.gather(1, wanted_L.clamp(min=0)[:, None])[:, 0]
        loss = -(chosen_L * (wanted_L != NO_TARGET)).sum() / targets
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


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
    lengths = [len(example.input_ids_L) for example in examples]
    padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids_RxL, mask_RxL = pad_rows(torch.cat([example.input_ids_L for example in examples]), lengths, padding)
    labels = [example.labels for example in examples]
    padded_labels = torch.stack(labels) if labels[0].dim() == 0 else pad_rows(torch.cat(labels), lengths, NO_TARGET)[0]
    inputs = {"input_ids": ids_RxL, "attention_mask": mask_RxL, "labels": padded_labels}
    return {name: x for name, x in inputs.items() if name in inspect.signature(model.forward).parameters}


def tokenizer_for(head: str, kind: str) -> PreTrainedTokenizerBase:
    """Return a small tokenizer. For a decoder, it pads with the token that ends texts."""
    decoder = kind not in types_of("masked") and not AutoConfig.for_model(kind).is_encoder_decoder
    return _tokenizer(head == "causal" or (head == "classification" and decoder and kind in types_of("causal")))


@cache
def _tokenizer(causal: bool) -> PreTrainedTokenizerBase:
    documents = Dataset.from_dict({"text": [f"{i} and {i * i} make {i + i * i}, all told." for i in range(200)]})
    return train_tokenizer(documents, "bpe", VOCABULARY, causal=causal)


def rows_of(head: str, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return random rows of LENGTHS. In a classification, each ends with the token that ends texts."""
    ids_T, ends = np.random.default_rng(0).integers(5, len(tokenizer), sum(LENGTHS)), np.cumsum(LENGTHS)
    if head == "classification" and tokenizer.sep_token_id is not None:
        ids_T[ends - 1] = tokenizer.sep_token_id
    return np.split(ids_T, ends[:-1])


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


def summary(results: Sequence[Result]) -> dict[str, int]:
    """Return the counts of one head."""
    return {
        "in mapping": len(results),
        "built": sum(result.built for result in results),
        "refused as it comes": sum(result.refused for result in results),
        "loss and gradients equal": sum(result.equal for result in results),
        "special ids right": sum(
            bool(result.special) and {*result.special.values()} <= {"equal", "refused"} for result in results
        ),
        "sparse": sum(result.shortcuts.get("sparse", False) for result in results),
        "packed": sum(result.shortcuts.get("padding_free", False) for result in results),
        "fused": sum(result.shortcuts.get("fused", False) for result in results),
        "Trainer's loss right": sum(result.trainer == "right" for result in results),
    }


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
    counts = {}
    for head in [asked.head] if asked.head else HEADS:
        kinds = [kind for kind in types_of(head) if not only or kind in only]
        print(f"\n{head}", flush=True)
        results = []
        with ThreadPoolExecutor(2) as pool:
            for result in pool.map(partial(measure_in_process, head), kinds):
                print(line(result), flush=True)
                results.append(result)
        counts[head] = summary(results)
    for name in next(iter(counts.values())):
        print(f"{name:26}" + "".join(f"{head} {count[name]:4}   " for head, count in counts.items()))


if __name__ == "__main__":
    main()
