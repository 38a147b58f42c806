"""One run, described by a tree of frozen dataclasses: `Config(data=…, model=…, …)`.

Every default lives here, every value is checked on construction, and every field is a command-line flag of the same
name (`--batch.examples 64`). This file imports neither torch nor transformers, so that `--help` and a mistyped flag
are answered at once.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from minilm.checks import check, check_choices, check_repo_id

Value = bool | int | float | str | list[str]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the documents come from."""

    source: str | tuple[str, ...] = "pydocs"
    """pydocs (Python's documentation), a file, folder or glob (.txt .jsonl .csv .tsv .parquet .arrow, or .gz of the
    first four), a folder that save_to_disk wrote, or a hub dataset id; or several of them, one after the other."""
    weights: tuple[float, ...] = ()
    """How often an epoch sees the training documents of each source: 2 is twice, 0.5 a half drawn by seed. Default: 1
    each."""
    config: str | None = None
    """Configuration of a hub dataset, such as wikitext-2-raw-v1."""
    split: str = "train"
    """Part to train on; slices such as train[:5000] work."""
    column: str = "text"
    """Column that holds the text; a dotted path such as answers.text reaches into nested columns."""
    pair_column: str | None = None
    """Column of a second text that goes with the first, such as sentence2; GLUE's are known."""
    label_column: str = "label"
    """Column of the labels where the objective needs them."""
    document: Literal["line", "paragraph", "file"] = "line"
    """What one document is in a .txt file: each line, each paragraph between blank lines, or all of it."""
    eval_source: str | None = None
    """Evaluation documents, given like source. Default: eval_split, or else eval_fraction of the source."""
    eval_split: str | None = None
    """Part of the source to evaluate on, such as validation; several, joined by +, are evaluated each by itself."""
    eval_fraction: float = 0.05
    """Share of the documents held out by seed for evaluation (of pydocs: of the bytes, in whole modules; where a
    document is a file: the end of each)."""

    streaming: bool = False
    """Read the documents from the source as they are encoded, and store nothing but their tokens. Held out is then each
    document at which another eval_fraction is full. Of one hub dataset, no more is read than run.max_steps needs."""

    def __post_init__(self) -> None:
        check_choices("data", self)
        check(not self.streaming or "pydocs" not in self.sources, "data.streaming: pydocs is no stream; leave it out")
        check(
            not self.streaming or self.document != "file",
            "data.streaming: a document cannot be a whole file; pass another data.document",
        )
        known = len(self.sources) > 0 and all(self.sources)
        check(known, "data.source is empty: give a file, a folder, a hub dataset id, or pydocs")
        check(
            len(self.weights) in (0, len(self.sources)),
            f"data.weights must be one for each source: there are {len(self.weights)} of {len(self.sources)}",
        )
        for weight in self.weights:
            check(0 < weight < float("inf"), f"data.weights must be positive, not {weight}")
        check(0 < self.eval_fraction < 1, f"data.eval_fraction must lie between 0 and 1, not {self.eval_fraction}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, be they one or several."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokenizer: the model's own, another one by name, or one trained on the documents."""

    name: str | None = None
    """Hub id or folder of a tokenizer. Default: the model's; where the model is built from scratch, one is trained."""
    kind: Literal["bpe", "wordpiece", "unigram", "characters"] = "bpe"
    """A trained tokenizer's algorithm: byte-level BPE, WordPiece (lower-cased), Unigram, or a token a character."""
    vocab_size: int = 8192
    """Size of a trained tokenizer's vocabulary, special tokens included; of characters there are as many as occur."""
    extend: int = 0
    """Words of the documents to add to a checkpoint's tokenizer: the most frequent of those that it splits."""
    overflow: Literal["split", "truncate"] = "split"
    """A document longer than batch.max_length becomes several examples (no token is dropped), or is cut off."""

    def __post_init__(self) -> None:
        check_choices("tokens", self)
        check(300 <= self.vocab_size < 2**24, f"tokens.vocab_size must lie in [300, 2**24), not {self.vocab_size}")
        check(self.extend >= 0, f"tokens.extend must be 0 or more, not {self.extend}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model: a checkpoint by name, or one built from a Hugging Face configuration with random weights."""

    name: str | None = None
    """Hub id or folder of a checkpoint to start from. Default: build from type and config."""
    type: str = "modernbert"
    """Hugging Face model type to build (bert, roberta, modernbert, …) when no name is given."""
    config: dict[str, Value] = field(default_factory=dict)
    """Fields of the Hugging Face configuration to set, such as hidden_dropout_prob 0.0; with a name: to override."""
    freeze: tuple[str, ...] = ()
    """Parameters to leave as they are, by patterns of their names, such as *.embeddings.* and *.layer.[0-3].*"""
    lora_rank: int = 0
    """Train low-rank updates of this rank in place of the weights (LoRA, which takes peft); a classifier's head is
    trained as it is. 0: train the weights."""
    lora_alpha: float = 16.0
    """The updates are scaled by lora_alpha / lora_rank: a constant, as in the paper, whatever the rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers to update, by patterns of the ends of their names, such as query or layer.[0-3].*; * is all of
    them. Default: those that peft knows for the type of model, or else those of the attention."""
    gradient_checkpointing: bool = False
    """Compute each layer again on the way back instead of keeping what it computed: less memory, a third more work."""
    attention: str = "auto"
    """auto: without padding where that changes no logit; or transformers' own: sdpa, eager, flash_attention_2, …"""

    def __post_init__(self) -> None:
        check(self.lora_rank >= 0, f"model.lora_rank must be 0 or more, not {self.lora_rank}")
        check(0 < self.lora_alpha < float("inf"), f"model.lora_alpha must be positive, not {self.lora_alpha}")
        if self.lora_rank:
            check(self.name is not None, "model.lora_rank takes a checkpoint to start from: set model.name")
            check(
                not self.freeze, "model.freeze: LoRA freezes all that it does not train; choose by model.lora_targets"
            )
        else:
            check(not self.lora_targets, "model.lora_targets takes a rank: set model.lora_rank")


@dataclass(frozen=True, kw_only=True)
class MaskedLM:
    """Masked LM (BERT, Devlin et al. 2019, section 3.1): most targets are masked, some replaced, the others kept."""

    rate: float = 0.15
    """Share of the tokens that a training step predicts."""
    final_rate: float | None = None
    """Share at the end of the run, where it is to change: linearly, from rate on."""
    unit: Literal["token", "word", "span"] = "token"
    """What training chooses at random: tokens, whole words, or spans of 1 to 10 words. The share of tokens is rate."""
    masked: float = 0.8
    """Share of training's targets that a mask token stands for."""
    replaced: float = 0.1
    """Share of training's targets that a random token stands for; those neither masked nor replaced stay visible."""
    eval_rate: float = 0.15
    """Share of the tokens that evaluation predicts: always the same ones, split 80/10/10, whatever training does."""
    label_smoothing: float = 0.0
    """Share of a target's probability that training spreads over the whole vocabulary; evaluation has none."""

    def __post_init__(self) -> None:
        check_choices("objective", self)
        check(0 <= self.label_smoothing < 1, f"objective.label_smoothing={self.label_smoothing} is not in [0, 1)")
        for name in ("rate", "final_rate", "eval_rate"):
            value = getattr(self, name)
            check(value is None or 0 < value <= 1, f"objective.{name} must lie in (0, 1], not {value}")
        for name in ("masked", "replaced"):
            check(0 <= getattr(self, name) <= 1, f"objective.{name} must lie in [0, 1], not {getattr(self, name)}")
        check(self.masked + self.replaced < 1 + 1e-9, "objective.masked and objective.replaced sum to more than 1")


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Causal LM (Radford et al. 2019): each token of a document but the first is predicted from those before it."""

    label_smoothing: float = 0.0
    """Share of a target's probability that training spreads over the whole vocabulary; evaluation has none."""

    def __post_init__(self) -> None:
        check(0 <= self.label_smoothing < 1, f"objective.label_smoothing={self.label_smoothing} is not in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Sequence classification: data.label_column is predicted from a text, or with data.pair_column from two."""

    problem: Literal["auto", "single-label", "multi-label", "regression"] = "auto"
    """What a label is: a class, a list of labels, or a number. auto: lists are several labels, numbers with a
    decimal point a regression."""
    class_weights: Literal["equal", "balanced"] = "equal"
    """What an example of a class counts in training: the same, or the less the more of them there are."""
    label_smoothing: float = 0.0
    """Share of each training target that is spread over all classes; evaluation has none."""

    def __post_init__(self) -> None:
        check_choices("objective", self)
        check(0 <= self.label_smoothing < 1, f"objective.label_smoothing={self.label_smoothing} is not in [0, 1)")
        if self.problem != "auto":
            self.check_problem(self.problem)

    def check_problem(self, problem: str) -> None:
        """Raise ValueError for settings that mean nothing where the labels are of this `problem`."""
        given = {"class_weights": self.class_weights != "equal", "label_smoothing": self.label_smoothing > 0}
        for name in given:
            single = problem == "single-label" or not given[name]
            check(single, f"objective.{name} needs single labels, but the problem is {problem}")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one optimizer step sees, and how it is cut to fit the device."""

    examples: int = 32
    """Examples in a step, all processes and micro-batches together."""
    max_length: int = 128
    """Longest example in tokens, special tokens included."""
    micro_tokens: int | Literal["auto"] = 4096
    """Most tokens, padding included, in a device's forward pass; auto tries a few sizes and takes the fastest that
    fits. Changes speed and memory, and not the result but for what dropout draws."""
    layout: Literal["documents", "blocks", "packed"] = "documents"
    """An example is a document (or a piece of a long one), a full block cut from all documents joined together, or,
    packed, as many documents as max_length holds, each read alone."""
    group: Literal["step", "epoch"] = "step"
    """Group examples by length inside each random step, or over the epoch (for models that need padding: a step then
    sees one length)."""
    workers: int = 0
    """Processes that prepare batches ahead of the training process. Changes speed, not the result."""

    def __post_init__(self) -> None:
        check_choices("batch", self)
        check(self.examples >= 1, f"batch.examples must be at least 1, not {self.examples}")
        check(self.max_length >= 8, f"batch.max_length must be at least 8 tokens, not {self.max_length}")
        number = 1 if self.micro_tokens == "auto" else self.micro_tokens
        check(isinstance(number, int) and number >= 1, f"batch.micro_tokens must be auto or at least 1, not {number}")
        check(self.workers >= 0, f"batch.workers must be 0 or more, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW (Loshchilov and Hutter 2019); the learning rate is a function of the step."""

    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay from the peak to zero at the last step, or none."""
    warmup: float = 0.06
    """Linear warm-up: a share of all steps if below 1, else a number of steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    layer_decay: float = 1.0
    """The head learns at lr, each layer below at this share of the rate above it, the embeddings at the least."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is larger; 0 switches clipping off."""

    def __post_init__(self) -> None:
        check_choices("optim", self)
        check(0 < self.lr < float("inf"), f"optim.lr must be positive, not {self.lr}")
        for name in ("warmup", "weight_decay"):
            check(0 <= getattr(self, name) < float("inf"), f"optim.{name} must be 0 or more, not {getattr(self, name)}")
        check(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must lie in [0, 1), not {self.betas}")
        check(0 < self.layer_decay <= 1, f"optim.layer_decay must lie in (0, 1], not {self.layer_decay}")
        check(0 < self.eps < float("inf"), f"optim.eps must be positive, not {self.eps}")
        check(self.max_grad_norm >= 0, f"optim.max_grad_norm must be 0 or more, not {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, how precise, and where to."""

    epochs: float = 3.0
    """Passes over the training documents."""
    max_steps: int | None = None
    """Stop after this many steps instead; the schedule then ends there."""
    seed: int = 0
    """Decides initial weights, order, masks and dropout."""
    output_dir: str | None = None
    """Folder for the model, its card and the logs. Default: out/<recipe>, or out/<recipe>-2, … where that exists."""
    overwrite: bool = False
    """Write into an output_dir that is not empty: minilm's own files are replaced, all others are left alone."""
    resume: str | None = None
    """Go on from a checkpoint of this very run, to the bit: latest (of output_dir), or the path of one."""
    eval_every: int | None = None
    """Steps between evaluations. Default: after each epoch. The end of the run is always evaluated."""
    save_every: int = 1000
    """Steps between checkpoints; a run that is told to stop (SIGTERM, ctrl-C) saves one too. 0: none at all."""
    keep_last: int = 2
    """Checkpoints to keep: the newest ones, and besides them the best one by best_metric."""
    best_metric: str = "eval_loss"
    """Figure of the evaluation by which a checkpoint is the best one, such as accuracy or f1."""
    load_best: bool = False
    """End with the weights of the best evaluation in place of the last ones; each better one is then saved."""
    patience: int | None = None
    """Stop after this many evaluations in a row that are no better than the best. Default: never."""
    max_bad_steps: int = 10
    """Give up after this many steps in a row without a finite gradient; such steps change nothing."""
    timeout: int = 600
    """Seconds that a process waits for the others in a step before it gives them up."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the matrix products; weights stay fp32. auto measures what this hardware is fast at."""
    compile: bool = False
    """On a GPU, have torch.compile fuse layers and loss: faster steps after some 20 seconds. It takes a C compiler."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over processes. bf16 halves what they send, and rounds: the sums are others."""
    deterministic: bool = False
    """Only algorithms that repeat to the bit, on a GPU too; slower there. A CPU repeats without it."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where the figures of log.jsonl go as well; each is a package of its own, configured as it always is."""
    samples: tuple[str, ...] = ()
    """Texts with a mask token to fill in, or beginnings to go on from, at the end and for the model card."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, NAME or OWNER/NAME, to upload the result to at the end; whether the token
    may is asked at the start. It is created, as public as the hub makes it by default, before the first step."""
    license: str | None = None
    """License of the model for its card, by the hub's name for it, such as apache-2.0."""

    def steps(self, per_epoch: int) -> int:
        """How many there are, `per_epoch` in an epoch. 1.1 * 100 is a little over 110, which is meant."""
        return self.max_steps or max(1, int(-(-round(self.epochs * per_epoch, 6) // 1)))

    def __post_init__(self) -> None:
        check_choices("run", self)
        check(0 < self.epochs < float("inf"), f"run.epochs must be positive, not {self.epochs}")
        for name in ("max_steps", "eval_every", "keep_last", "patience", "max_bad_steps", "timeout"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"run.{name} must be at least 1, not {value}")
        check(self.timeout < 2**31, f"run.timeout must be below 2**31, not {self.timeout}")
        check(self.save_every >= 0, f"run.save_every must be 0 or more, not {self.save_every}")
        check(self.save_every > 0 or not self.load_best, "run.load_best takes a checkpoint: set run.save_every")
        check(not (self.resume and self.overwrite), "run.resume and run.overwrite exclude each other")
        check(
            not (self.compile and self.deterministic),
            "run.compile chooses by measuring, and the last bits may differ: leave it out, or run.deterministic",
        )
        check(0 <= self.seed < 2**63, f"run.seed must be 0 or more and fit 63 bits, not {self.seed}")
        if self.push_to_hub is not None:
            check_repo_id("run.push_to_hub", self.push_to_hub)
        named = self.license is None or re.fullmatch(r"[a-z0-9.+-]+", self.license)
        check(bool(named), f"run.license takes the hub's name for a license, such as apache-2.0, not {self.license!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, a field for each group of flags. `train(config)` needs nothing else."""

    data: Data = field(default_factory=Data)
    tokens: Tokens = field(default_factory=Tokens)
    model: Model = field(default_factory=Model)
    objective: MaskedLM | CausalLM | Classification = field(default_factory=MaskedLM)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)


def lower_is_better(metric: str) -> bool:
    """Whether the figure of an evaluation of this name is a loss."""
    return metric.startswith(("eval_loss", "perplexity", "bits_per_byte", "mse"))
