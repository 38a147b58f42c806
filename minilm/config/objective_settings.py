"""The settings of objectives: `ObjectiveSettings`, which all of them share, and a class for each objective of minilm.

`Config(objective=SentenceEmbedding(pooling="first"))` trains for one. `minilm.objectives` has the code of each.
"""

from dataclasses import dataclass
from typing import Literal

from minilm.utils.validation import check, check_choices


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The base class of the settings of all objectives. `minilm.Objective` is the one to write an objective with."""

    teacher: str | None = None
    """Hub id or folder of a trained model with the same tokens. The model then also learns to predict what the teacher
    predicts (distillation, Hinton et al. 2015)."""
    teacher_weight: float = 0.5
    """Share of the training loss that compares the model with the teacher. The rest is the usual loss."""
    teacher_temperature: float = 1.0
    """Divisor of both models' logits when they are compared. Above 1, the teacher's unlikely predictions count more."""

    def __post_init__(self) -> None:
        check(0 <= self.teacher_weight <= 1, f"objective.teacher_weight must lie in [0, 1], not {self.teacher_weight}")
        check(
            0 < self.teacher_temperature < float("inf"),
            f"objective.teacher_temperature must be positive, not {self.teacher_temperature}",
        )


@dataclass(frozen=True, kw_only=True)
class MaskedLM(ObjectiveSettings):
    """Masked LM (BERT, Devlin et al. 2019, section 3.1): predict tokens that were masked, replaced or kept."""

    rate: float = 0.15
    """Share of the tokens that a training step predicts."""
    final_rate: float | None = None
    """Rate at the end of the run; the rate then changes linearly. Default: it stays the same."""
    rate_decay: float = 1.0
    """Share of the steps, at the end of the run, in which the rate changes to final_rate."""
    unit: Literal["token", "word", "span"] = "token"
    """What training chooses at random: tokens, whole words, or spans of 1 to 10 words, until rate is reached."""
    masked: float = 0.8
    """Share of the targets that training replaces with the mask token."""
    replaced: float = 0.1
    """Share of the targets that training replaces with a random token. The remaining targets stay visible."""
    eval_rate: float = 0.15
    """Share of the tokens that evaluation predicts: always the same tokens, 80% masked, 10% replaced, 10% kept."""
    label_smoothing: float = 0.0
    """Share of a target's probability that training spreads over the whole vocabulary. Evaluation does not smooth."""
    z_loss: float = 0.0
    """Weight of an additional training loss, log(Z)^2, which keeps the denominator Z of the softmax near 1. 1e-4 is
    usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("objective", self)
        check(
            0 <= self.label_smoothing < 1, f"objective.label_smoothing must lie in [0, 1), not {self.label_smoothing}"
        )
        check(0 <= self.z_loss < float("inf"), f"objective.z_loss must be 0 or more, not {self.z_loss}")
        for name in ("rate", "final_rate", "eval_rate"):
            value = getattr(self, name)
            check(value is None or 0 < value <= 1, f"objective.{name} must lie in (0, 1], not {value}")
        check(0 < self.rate_decay <= 1, f"objective.rate_decay must lie in (0, 1], not {self.rate_decay}")
        check(
            self.rate_decay == 1 or self.final_rate is not None,
            "objective.rate_decay needs a rate to change to: set objective.final_rate",
        )
        for name in ("masked", "replaced"):
            check(0 <= getattr(self, name) <= 1, f"objective.{name} must lie in [0, 1], not {getattr(self, name)}")
        check(
            self.masked + self.replaced < 1 + 1e-9,
            "objective.masked and objective.replaced sum to more than 1: lower one of them",
        )

    def rate_at(self, progress: float) -> float:
        """Return the rate when the share `progress` of the run's steps is done."""
        first = 1 - self.rate_decay
        if self.final_rate is None or progress <= first:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * (progress - first) / self.rate_decay


@dataclass(frozen=True, kw_only=True)
class CausalLM(ObjectiveSettings):
    """Causal LM (Radford et al. 2019): predict each token of a document but the first from the tokens before it."""

    label_smoothing: float = 0.0
    """Share of a target's probability that training spreads over the whole vocabulary. Evaluation does not smooth."""
    z_loss: float = 0.0
    """Weight of an additional training loss, log(Z)^2, which keeps the denominator Z of the softmax near 1. 1e-4 is
    usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.label_smoothing < 1, f"objective.label_smoothing must lie in [0, 1), not {self.label_smoothing}"
        )
        check(0 <= self.z_loss < float("inf"), f"objective.z_loss must be 0 or more, not {self.z_loss}")


@dataclass(frozen=True, kw_only=True)
class Classification(ObjectiveSettings):
    """Sequence classification: predict data.label_column from a text, or from two texts with data.pair_column."""

    problem: Literal["auto", "single-label", "multi-label", "regression"] = "auto"
    """What a label is: a class, a list of labels, or a number. auto: lists are several labels, numbers with a decimal
    point are a regression, and words and whole numbers are classes."""
    class_weights: Literal["equal", "balanced"] = "equal"
    """Weight of a class in training: equal, or balanced (inversely proportional to its number of examples)."""
    label_smoothing: float = 0.0
    """Share of a target's probability that training spreads over all classes. Evaluation does not smooth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("objective", self)
        check(
            0 <= self.label_smoothing < 1, f"objective.label_smoothing must lie in [0, 1), not {self.label_smoothing}"
        )
        if self.problem != "auto":
            self.check_problem(self.problem)

    def check_problem(self, problem: str) -> None:
        """Raise ValueError for settings that do not apply to labels of this `problem`."""
        given = {"class_weights": self.class_weights != "equal", "label_smoothing": self.label_smoothing > 0}
        for name in given:
            single = problem == "single-label" or not given[name]
            check(single, f"objective.{name} needs one class for each text, but the problem is {problem}: leave it out")


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuning(ObjectiveSettings):
    """Supervised fine-tuning of a causal LM: predict what the assistant of a chat says (Ouyang et al. 2022)."""

    format: Literal["messages", "completion", "text"] = "messages"
    """What a row is. messages: a chat, a list of messages with role and content, in data.column (messages unless set).
    completion: a prompt in data.column (prompt unless set) and its completion in data.pair_column (completion unless
    set), joined as they are. text: one text in data.column."""
    template: Literal["chatml", "llama3", "mistral", "gemma", "plain"] | None = None
    """Chat template, which writes the messages as text, for a base model. Special tokens that the tokenizer lacks are
    added to it, and the template is saved with it. plain adds none. Default: the tokenizer's own."""
    targets: Literal["assistant", "all"] = "assistant"
    """Which tokens are predicted. assistant: those of the assistant's messages, or of the completion, with the token
    that ends them. all: every token but the first."""
    too_long: Literal["refuse", "cut", "drop"] = "refuse"
    """What happens to rows longer than batch.max_length. refuse: the run does not start. cut: they lose their ends, and
    are left out if nothing to predict remains. drop: they are left out. The log has the number of such rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("objective", self)
        check(
            self.format == "messages" or self.template is None,
            f"objective.template writes messages as text, but objective.format is {self.format}: leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class SentenceEmbedding(ObjectiveSettings):
    """Sentence embeddings: a text (data.column) is nearer to its pair (data.pair_column) than to the other texts.

    The other texts are those of the same step, and the hard negatives of data.negative_column. With data.score_column,
    the embeddings of a pair are instead as near as its score says.
    """

    pooling: Literal["mean", "first", "last"] = "mean"
    """What a text's embedding is: the mean of the hidden states of its tokens, or that of its first or last token."""
    temperature: float = 0.05
    """Cosine similarities are divided by this number in the contrastive loss and in cosent."""
    symmetric: bool = False
    """Compare the second text of a pair with the first texts too. The loss is the mean of both directions."""
    score_loss: Literal["cosent", "cosine"] = "cosent"
    """The loss of scores. cosent: a pair with a higher score has a higher cosine. cosine: the squared difference
    between the cosine and the score."""
    max_score: float = 1.0
    """Score of two texts with the same meaning, such as 5 for STS. For the loss cosine, scores are divided by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("objective", self)
        for name in ("temperature", "max_score"):
            value = getattr(self, name)
            check(0 < value < float("inf"), f"objective.{name} must be positive, not {value}")


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(ObjectiveSettings):
    """Extractive question answering (SQuAD, Rajpurkar et al. 2016): find where in a context the answer stands.

    A row has a question (data.column), a context (data.pair_column) and its answers (data.label_column).
    """

    stride: int = 128
    """A context that exceeds batch.max_length is read in windows. This is the number of its tokens that a window shares
    with the window before it."""
    no_answer: bool = False
    """A question may have no answer in its context, as in SQuAD 2.0. If not set, a row without an answer is refused."""
    null_threshold: float = 0.0
    """With no_answer, the evaluation predicts no answer if the log-probability of that exceeds the log-probability of
    the best answer by more than this number."""
    max_answer: int = 30
    """Maximum length of a predicted answer in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.stride >= 0, f"objective.stride must be 0 or more, not {self.stride}")
        check(self.max_answer >= 1, f"objective.max_answer must be at least 1, not {self.max_answer}")
        check(
            abs(self.null_threshold) < float("inf"),
            f"objective.null_threshold must be a finite number, not {self.null_threshold}",
        )
        check(
            self.no_answer or self.null_threshold == 0,
            "objective.null_threshold has no effect without objective.no_answer: set that too, or leave it out",
        )


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(ObjectiveSettings):
    """Multiple choice (SWAG, Zellers et al. 2018): find which of several continuations or answers is right.

    Each choice is read after the text of data.column. With data.pair_column, the text there begins each choice.
    """

    choices: tuple[str, ...] = ("ending0", "ending1", "ending2", "ending3")
    """Columns of the choices: one for each choice, or a single one with lists of choices, which may differ in length.
    Default: those of SWAG."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len({*self.choices}) == len(self.choices) > 0, "objective.choices must name different columns")


@dataclass(frozen=True, kw_only=True)
class TokenClassification(ObjectiveSettings):
    """Token classification (as in CoNLL-2003, Tjong Kim Sang and De Meulder 2003): predict the tag of each word.

    A row has a list of words (data.column, tokens unless set) and a list of their tags (data.label_column, ner_tags
    unless set).
    """

    scheme: Literal["auto", "iob2", "iob1", "plain"] = "auto"
    """How tags mark spans of words. iob2: B-x begins a span, I-x continues it, and O is outside. iob1: I-x also begins
    a span, unless it follows another span x; such tags are turned into iob2. plain: tags mark no spans, as parts of
    speech. auto: iob2 if every tag is O, B-x or I-x, else plain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("objective", self)
