"""The settings of a run, as a tree of frozen dataclasses: `Config(data=…, model=…, …)`.

Every default is here; those of the objectives are in `objective_settings`. A constructor checks its values. Each field
is also a flag of the same name on the command line (`--batch.examples 64`). This file imports neither torch nor
transformers, so that `--help` and the error about a mistyped flag appear at once.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from minilm.config.objective_settings import MaskedLM, ObjectiveSettings
from minilm.config.phases import Phase, list_periods
from minilm.utils.number_ranges import parse_ranges
from minilm.utils.validation import check, check_choices, check_repo_id

ConfigValue = bool | int | float | str | list[str]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the documents come from."""

    source: str | tuple[str, ...] = "pydocs"
    """Where the documents are: pydocs (Python's documentation), a file, folder or glob (.txt .json .jsonl .csv .tsv
    .conll .iob .bio .parquet .arrow .mds .tar, or .gz of these), a folder of save_to_disk or minilm tokenize, or a hub
    dataset id. Several are read in turn."""
    weights: tuple[float, ...] = ()
    """How often an epoch sees the training documents of each source: 2 means twice, 0.5 means a random half of them.
    Default: 1 for each source. In tokenised shards, and in a stream of several windows, the weights are the shares of
    the sources in the tokens of a window."""
    config: str | None = None
    """Configuration of a hub dataset, such as wikitext-2-raw-v1."""
    split: str = "train"
    """Split to train on. Slices such as train[:5000] work."""
    column: str = "text"
    """Column that holds the text. A dotted path such as answers.text reaches into nested columns."""
    delimiter: str | None = None
    """Character between the fields of .csv and .tsv files, or the word tab. Default: the comma, semicolon, tab or
    vertical bar that the header has."""
    pair_column: str | None = None
    """Column of a second text that belongs to the first, such as sentence2. For GLUE's tasks minilm sets it itself."""
    negative_column: str | None = None
    """Column of a text that does not belong to the first, for sentence embeddings: a hard negative of each pair."""
    score_column: str | None = None
    """Column of numbers that say how similar the two texts of a pair are, for sentence embeddings."""
    label_column: str = "label"
    """Column of the labels, for objectives that need labels."""
    label_separator: str | None = None
    """Text between the labels of a cell that lists several, such as the comma of joy,anger. A blank cell then has no
    label. Default: each cell is one label."""
    document: Literal["line", "paragraph", "file"] = "line"
    """What one document of a .txt file is: a line, a paragraph between blank lines, or the whole file."""
    eval_source: str | None = None
    """Evaluation documents, given like source. Default: eval_split if it is set, else eval_fraction of the source."""
    eval_split: str | None = None
    """Split of the source to evaluate on, such as validation. Several splits joined by + are evaluated separately."""
    eval_fraction: float = 0.05
    """Share of the documents to hold out for evaluation, chosen at random by run.seed. For pydocs it is a share of the
    bytes, in whole modules. If data.document is file, minilm holds out the end of each file."""
    exclude_loss: str | None = None
    """Training documents whose tokens are read but are not targets, by their numbers from 0, such as 3,17,40-45. The
    loss is the mean over the other targets. minilm replay sets it. Default: none."""
    streaming: bool = False
    """Encode the documents while they are read, and store only their tokens. A hash of its text then decides whether a
    document is held out."""
    max_tokens: int | None = None
    """Tokens to train on, in place of epochs or in addition to run.max_steps. minilm divides it by the mean tokens of a
    step to get run.max_steps. In a stream of several windows, the first million tokens give that mean."""
    window_tokens: int = 16_000_000
    """With streaming, the tokens of a window. A run trains on one window while it encodes the next. More text than a
    window needs run.max_steps or max_tokens, and the order is then random within a window and over files."""

    def __post_init__(self) -> None:
        check_choices("data", self)
        is_character = self.delimiter is None or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n\0')
        check(
            is_character or self.delimiter == "tab",
            f"data.delimiter must be one character or tab, not {self.delimiter!r}",
        )
        check(
            not self.streaming or "pydocs" not in self.sources,
            "data.streaming: pydocs cannot be streamed; leave data.streaming out",
        )
        check(
            not self.streaming or self.document != "file",
            "data.streaming: a document cannot be a whole file; pass another data.document",
        )
        check(
            self.max_tokens is None or self.max_tokens >= 1,
            f"data.max_tokens must be at least 1, not {self.max_tokens}",
        )
        check(self.window_tokens >= 1, f"data.window_tokens must be at least 1, not {self.window_tokens}")
        all_named = len(self.sources) > 0 and all(self.sources)
        check(all_named, "data.source is empty: give a file, a folder, a hub dataset id, or pydocs")
        check(
            len(self.weights) in (0, len(self.sources)),
            f"data.weights takes one number for each source, but has {len(self.weights)} for {len(self.sources)}",
        )
        for weight in self.weights:
            check(0 < weight < float("inf"), f"data.weights must be positive, not {weight}")
        check(self.label_separator != "", "data.label_separator is empty: give the text between labels")
        if self.exclude_loss is not None:
            try:
                parse_ranges(self.exclude_loss)
            except ValueError as error:
                raise ValueError(f"data.exclude_loss: {error}") from None
        check(0 < self.eval_fraction < 1, f"data.eval_fraction must lie between 0 and 1, not {self.eval_fraction}")

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources as a tuple, even if there is only one."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokenizer: the model's own, another one by name, or one trained on the documents."""

    name: str | None = None
    """Hub id or folder of a tokenizer. Default: the checkpoint's tokenizer; for a new model, minilm trains one."""
    kind: Literal["bpe", "wordpiece", "unigram", "characters"] = "bpe"
    """Algorithm of a trained tokenizer: byte-level BPE, lower-cased WordPiece, Unigram, or one token per character."""
    vocab_size: int = 8192
    """Vocabulary size of a trained tokenizer, special tokens included. Not used with characters."""
    extend: int = 0
    """Number of words to add to a checkpoint's tokenizer: the most frequent words that it splits."""
    overflow: Literal["split", "truncate"] = "split"
    """What happens to a document longer than batch.max_length. split: it becomes several examples, without loss of a
    token. truncate: only its beginning is used."""

    def __post_init__(self) -> None:
        check_choices("tokens", self)
        check(300 <= self.vocab_size < 2**24, f"tokens.vocab_size must lie in [300, 2**24), not {self.vocab_size}")
        check(self.extend >= 0, f"tokens.extend must be 0 or more, not {self.extend}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model: a checkpoint by name, or one built from a Hugging Face configuration with random weights."""

    name: str | None = None
    """Hub id or folder of a checkpoint to start from. Default: build a new model from type and config."""
    type: str = "modernbert"
    """Hugging Face model type of a new model (bert, roberta, modernbert, …). Not used with model.name."""
    config: dict[str, ConfigValue] = field(default_factory=dict)
    """Fields of the Hugging Face configuration, such as hidden_dropout_prob 0.0. They override a checkpoint's."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, as patterns of names, such as *.embeddings.* and *.layer.[0-3].*"""
    lora_rank: int = 0
    """Rank of the low-rank updates that are trained in place of the weights (LoRA; needs peft). A classifier's head is
    trained as usual. 0: train the weights."""
    lora_alpha: float = 16.0
    """Scale of the updates: they are multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers to update, as patterns of the ends of their names, such as query or layer.[0-3].*; * means all.
    Default: the layers that peft knows for the model type, or else those of the attention."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of storing its activations: less memory, a third more work."""
    attention: str = "auto"
    """Attention implementation. auto packs rows without padding if that does not change a logit. The other values are
    those of transformers: sdpa, eager, …"""

    def __post_init__(self) -> None:
        check(self.lora_rank >= 0, f"model.lora_rank must be 0 or more, not {self.lora_rank}")
        check(0 < self.lora_alpha < float("inf"), f"model.lora_alpha must be positive, not {self.lora_alpha}")
        if self.lora_rank:
            check(self.name is not None, "model.lora_rank needs a checkpoint to start from: set model.name")
            check(
                not self.freeze,
                "model.freeze: LoRA itself freezes all other weights; leave it out, and choose by model.lora_targets",
            )
        else:
            check(not self.lora_targets, "model.lora_targets needs a rank: set model.lora_rank")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of an optimizer step, and how they are cut into micro-batches that fit the device."""

    examples: int = 32
    """Examples in an optimizer step, over all processes and micro-batches."""
    max_length: int = 128
    """Maximum length of an example in tokens, special tokens included."""
    micro_tokens: int | Literal["auto"] = 4096
    """Maximum number of tokens in a forward pass of a device, padding included. auto tries a few sizes and takes the
    fastest that fits. It changes speed and memory, but not the result, except for what dropout draws."""
    layout: Literal["documents", "blocks", "packed"] = "documents"
    """What an example is. documents: one document, or a piece of a long one. blocks: a full block cut from all
    documents joined together. packed: as many documents as max_length holds; attention stays within each."""
    group: Literal["step", "epoch"] = "step"
    """Where examples are grouped by length. step: within each random step. epoch: over the whole epoch, so that a step
    has examples of one length; this biases the batches and helps only models that need padding."""
    workers: int = 0
    """Number of processes that prepare batches ahead of the training process. It changes speed, not the result."""

    def __post_init__(self) -> None:
        check_choices("batch", self)
        check(self.examples >= 1, f"batch.examples must be at least 1, not {self.examples}")
        check(self.max_length >= 8, f"batch.max_length must be at least 8 tokens, not {self.max_length}")
        number = 1 if self.micro_tokens == "auto" else self.micro_tokens
        check(isinstance(number, int) and number >= 1, f"batch.micro_tokens must be auto or at least 1, not {number}")
        check(self.workers >= 0, f"batch.workers must be 0 or more, not {self.workers}")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW (Loshchilov and Hutter 2019) or Muon (Jordan et al. 2024). The learning rate depends on the step."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon: Muon for the weight matrices inside the layers, AdamW for the embeddings, the head, norms and
    biases. Rates that suit AdamW suit Muon."""
    lr: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd", "inverse-sqrt"] = "linear"
    """Course of the rate after the warm-up. linear, cosine: it decays over all steps. wsd: it is constant and decays at
    the end. inverse-sqrt: it falls with 1 / sqrt(step). constant: it stays at the peak."""
    warmup: float = 0.06
    """Length of the linear warm-up: a share of all steps if below 1, else a number of steps."""
    decay: float = 0.2
    """Length of the decay of wsd: a share of all steps if below 1, else a number of steps."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    """Shape of the decay of wsd. 1-sqrt falls fast at first."""
    final_lr: float = 0.0
    """Final rate as a share of lr. The last step is one step short of it. inverse-sqrt never falls below it."""
    weight_decay: float = 0.01
    """Decoupled weight decay of weight matrices and embeddings. Vectors, biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon_momentum: float = 0.95
    """Muon's decay rate of the average of gradients, with Nesterov momentum."""
    muon_iterations: int = 5
    """Newton-Schulz iterations of Muon's matrices in a step. Fewer are faster and less exact."""
    muon_scale: float = 0.2
    """Size of Muon's updates: the root mean square of their elements, as a multiple of the learning rate. 0.2 is that
    of AdamW's."""
    layer_decay: float = 1.0
    """Ratio of each layer's learning rate to that of the layer above it. The head has lr itself, the embeddings the
    lowest rate."""
    max_grad_norm: float = 1.0
    """Norm to which a larger gradient is scaled down. 0 switches clipping off."""
    ema: float | None = None
    """Decay rate of an exponential average of the weights, such as 0.999, which averages about the last 1,000 steps. It
    is evaluated too, and saved in the folder ema of the output folder. Default: no average."""

    def __post_init__(self) -> None:
        check_choices("optim", self)
        check(0 < self.lr < float("inf"), f"optim.lr must be positive, not {self.lr}")
        for name in ("warmup", "decay", "weight_decay"):
            check(0 <= getattr(self, name) < float("inf"), f"optim.{name} must be 0 or more, not {getattr(self, name)}")
        check(0 <= self.final_lr <= 1, f"optim.final_lr must lie in [0, 1], not {self.final_lr}")
        check(
            self.schedule != "wsd" or max(self.warmup, self.decay) >= 1 or self.warmup + self.decay <= 1,
            f"optim.decay {self.decay} and optim.warmup {self.warmup} are more than all steps together: lower one",
        )
        check(
            self.schedule != "inverse-sqrt" or self.warmup > 0,
            "optim.warmup must be above 0 for the schedule inverse-sqrt, whose rates are multiples of its square root",
        )
        check(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must lie in [0, 1), not {self.betas}")
        check(0 <= self.muon_momentum < 1, f"optim.muon_momentum must lie in [0, 1), not {self.muon_momentum}")
        check(self.muon_iterations >= 1, f"optim.muon_iterations must be at least 1, not {self.muon_iterations}")
        check(0 < self.muon_scale < float("inf"), f"optim.muon_scale must be positive, not {self.muon_scale}")
        check(0 < self.layer_decay <= 1, f"optim.layer_decay must lie in (0, 1], not {self.layer_decay}")
        check(0 < self.eps < float("inf"), f"optim.eps must be positive, not {self.eps}")
        check(self.ema is None or 0 < self.ema < 1, f"optim.ema must lie in (0, 1), not {self.ema}")
        check(self.max_grad_norm >= 0, f"optim.max_grad_norm must be 0 or more, not {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long a run is, how precise, and where its output goes."""

    epochs: float = 3.0
    """Number of passes over the training documents."""
    max_steps: int | None = None
    """Number of steps, in place of epochs. The schedule ends there."""
    phases: tuple[Phase, ...] = ()
    """Settings that change during the run: max-length, examples, mask-rate or weights. Each phase is one argument, such
    as "start=0.9 max-length=512 examples=8", from 90% of the steps on. Evaluations use batch.max_length itself. Needs
    max_steps."""
    seed: int = 0
    """Seed of the initial weights, the order, the masks and dropout."""
    output_dir: str | None = None
    """Folder for the model, its card and the logs. Default: out/<recipe>, or the first free one of out/<recipe>-2, …"""
    overwrite: bool = False
    """Allow an output_dir that is not empty. minilm replaces its own files there and leaves all others alone."""
    resume: str | None = None
    """Continue this run from a checkpoint, to the bit: latest (in output_dir), or the path of a checkpoint."""
    eval_every: int | None = None
    """Steps between evaluations. Default: one after each epoch. The end of the run is always evaluated."""
    save_every: int = 1000
    """Steps between checkpoints. A run that is told to stop (SIGTERM, ctrl-C) saves one too. 0: save none."""
    keep_last: int = 2
    """Number of newest checkpoints to keep. The best checkpoint by best_metric is kept in addition."""
    ledger: bool = True
    """Keep the loss of each example at each evaluation in the folder ledger, for minilm ledger and minilm compare."""
    train_ledger: bool = False
    """Keep the loss of each training example in each epoch there too, eight bytes each, for minilm ledger --train."""
    best_metric: str = "eval_loss"
    """Evaluation figure that decides which checkpoint is the best, such as accuracy or f1."""
    load_best: bool = False
    """End with the weights of the best evaluation in place of the last ones. Each better checkpoint is then saved."""
    patience: int | None = None
    """Stop the run after this many evaluations in a row without a new best. Default: never stop early."""
    max_bad_steps: int = 10
    """Stop the run after this many steps in a row without a finite gradient. Such steps do not change a weight."""
    timeout: int = 600
    """Seconds that a process waits in a step for the other processes before it gives up."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the matrix products; weights stay fp32. auto measures which is fast on this hardware."""
    compile: bool = False
    """Fuse layers and loss with torch.compile, on a GPU. The first steps take longer, since they compile. Needs a C
    compiler."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over processes. bf16 halves the traffic and rounds the sums."""
    deterministic: bool = False
    """Use only algorithms that repeat to the bit on a GPU, which are slower. A CPU repeats to the bit anyway."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Trackers that also get the figures of log.jsonl. The package of each must be installed."""
    samples: tuple[str, ...] = ()
    """Texts to try the trained model on, for the model card: texts with a mask token, beginnings, or texts to
    classify."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, NAME or OWNER/NAME, to which the result is uploaded at the end. minilm checks
    the token at the start, and creates the repository with the hub's default visibility before the first step."""
    license: str | None = None
    """License for the model card, by the hub's name for it, such as apache-2.0."""

    def count_steps(self, per_epoch: int) -> int:
        """Return the number of steps of a run whose epochs have `per_epoch` steps each."""
        # In floating point, 1.1 * 100 is a little more than 110. It must give 110, so the product is rounded first.
        return self.max_steps or max(1, int(-(-round(self.epochs * per_epoch, 6) // 1)))

    def __post_init__(self) -> None:
        check_choices("run", self)
        check(0 < self.epochs < float("inf"), f"run.epochs must be positive, not {self.epochs}")
        for name in ("max_steps", "eval_every", "keep_last", "patience", "max_bad_steps", "timeout"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"run.{name} must be at least 1, not {value}")
        check(self.timeout < 2**31, f"run.timeout must be below 2**31, not {self.timeout}")
        check(self.save_every >= 0, f"run.save_every must be 0 or more, not {self.save_every}")
        check(self.save_every > 0 or not self.load_best, "run.load_best needs checkpoints: set run.save_every above 0")
        check(
            not (self.resume and self.overwrite),
            "run.resume and run.overwrite exclude each other: leave one of them out",
        )
        check(
            not (self.compile and self.deterministic),
            "run.compile chooses kernels by speed, so the last bits may differ: leave out run.compile or "
            "run.deterministic",
        )
        check(0 <= self.seed < 2**63, f"run.seed must be 0 or more and fit 63 bits, not {self.seed}")
        if self.push_to_hub is not None:
            check_repo_id("run.push_to_hub", self.push_to_hub)
        is_name = self.license is None or re.fullmatch(r"[a-z0-9.+-]+", self.license)
        check(
            bool(is_name), f"run.license takes the hub's name for a license, such as apache-2.0, not {self.license!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, with one field for each group of flags. `train(config)` needs nothing else."""

    data: Data = field(default_factory=Data)
    tokens: Tokens = field(default_factory=Tokens)
    model: Model = field(default_factory=Model)
    objective: ObjectiveSettings = field(default_factory=MaskedLM)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        check(
            not self.run.load_best or self.optim.ema is None,
            "run.load_best ends with the weights of the best step, and optim.ema averages up to the last step: leave "
            "one of them out",
        )
        check(
            self.data.exclude_loss is None or not any(phase.weights for phase in self.run.phases),
            "data.exclude_loss: a phase changes data.weights, and so the numbers of the documents: leave one out",
        )
        # This raises an error for phases that do not fit the other settings.
        if self.run.phases:
            list_periods(self)
