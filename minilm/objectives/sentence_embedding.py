"""Sentence embeddings: one vector for each text, so that texts that mean the same are near.

Axes: E examples, K texts of an example (anchor, positive, and perhaps a negative), H size of an embedding, M
candidates, Q different anchors.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from minilm.config import Config, Data, SentenceEmbedding
from minilm.config.phases import find_longest
from minilm.data.corpus import PreparedData
from minilm.data.encoding_errors import locate_encoding_errors
from minilm.data.example import Example, Remark
from minilm.data.memory import MemoryDocuments
from minilm.data.rows import Row
from minilm.models.head import Head
from minilm.models.sentence_files import describe_embedding
from minilm.objectives.evaluator import Evaluator
from minilm.objectives.example_evaluation import ExampleEvaluator
from minilm.objectives.objective import Objective
from minilm.utils.shell import format_command

_TEXTS = ("text", "pair", "negative")
_RETRIEVAL_FIGURES = ("accuracy@1", "mrr@10")
_DEEPEST_RANK = 10
# Anchors whose similarities with all candidates are in memory at a time.
_ANCHORS_PER_PART = 1024


@dataclass(frozen=True)
class SentenceEmbeddingObjective(Objective):
    """Sentence embeddings from pairs, from triplets with a hard negative, or from pairs with a score.

    The target of an example is its score, float32, or the identity of each of its texts, int64[K]. Texts with the same
    token ids have the same identity, since the model cannot tell them apart.
    """

    settings: SentenceEmbedding
    auto = AutoModel
    couples_examples = True
    title = "sentence embedding model"
    library = "sentence-transformers"
    pipeline = "sentence-similarity"

    @property
    def outputs(self) -> Any:  # type: ignore[override]
        """The pooling."""
        return self.settings.pooling

    def columns(self, data: Data) -> dict[str, str]:
        if data.pair_column is None:
            raise ValueError("sentence embeddings need pairs of texts: pass --data.pair-column")
        if data.negative_column is not None and data.score_column is not None:
            raise ValueError("data.negative_column: a pair with a score needs no negative; leave one of them out")
        names = (data.column, data.pair_column, data.negative_column, data.score_column)
        return {role: name for role, name in zip((*_TEXTS, "score"), names, strict=True) if name is not None}

    def prepare(self, config: Config, memory: MemoryDocuments | None = None) -> PreparedData:
        settings = self.settings
        given = {
            "symmetric": settings.symmetric and config.data.score_column is not None,
            "score_loss": settings.score_loss != SentenceEmbedding.score_loss and config.data.score_column is None,
            "max_score": settings.max_score != SentenceEmbedding.max_score and settings.score_loss != "cosine",
        }
        owners = {
            "symmetric": "pairs without scores",
            "score_loss": "scores",
            "max_score": "objective.score_loss cosine",
        }
        for name in given:
            if given[name]:
                raise ValueError(f"objective.{name} applies only to {owners[name]}: leave it out")
        return super().prepare(config, memory)

    def examples(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]
    ) -> Iterator[Example | Remark]:
        roles = [role for role in _TEXTS if role in rows[0]]
        for row in rows:
            if blank := [role for role in roles if not row[role].strip()]:
                raise ValueError(
                    f"{row.where}: the text of the {_NAMES[blank[0]]} is blank; fill it in, or remove the row"
                )
        texts = [row[role] for row in rows for role in roles]
        with locate_encoding_errors(tokenizer, texts):
            encoded = tokenizer(texts, truncation=True, return_attention_mask=False)
        typed = any(map(any, encoded.get("token_type_ids", ())))
        for number, row in enumerate(rows):
            own = slice(number * len(roles), (number + 1) * len(roles))
            ids = encoded["input_ids"][own]
            if not all(ids):
                raise ValueError(f"{row.where}: a text has no tokens; change it, or remove the row")
            yield Example(
                rows=ids,
                type_ids=encoded["token_type_ids"][own] if typed else None,
                target=self._read_score(row) if "score" in row else [_identify(each) for each in ids],
            )
            if any(each.overflowing for each in encoded.encodings[own]):
                yield Remark("rows have a text of more than batch.max_length tokens and are cut")

    def _read_score(self, row: Row) -> float:
        """Return the score of a pair, for the loss `cosine` as a share of `max_score`."""
        try:
            score = math.nan if isinstance(row["score"], bool) else float(row["score"])
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{row.where}: the score {row['score']!r} is not a number; correct the row")
        if self.settings.score_loss != "cosine":
            return score
        if abs(score) > self.settings.max_score:
            raise ValueError(
                f"{row.where}: the score {score:g} is more than the largest one, {self.settings.max_score:g}: pass "
                "--objective.max-score"
            )
        return score / self.settings.max_score

    def head(self, network: PreTrainedModel, prepared: PreparedData) -> Head:
        head = super().head(network, prepared)
        if _has_scores(prepared) and self.settings.score_loss == "cosine":
            head.coupled_rows = 0
        return head

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, float32[E]. `outputs`: E x K x H. `targets`: see the class."""
        units_ExKxH = F.normalize(outputs, dim=-1)
        if not targets.is_floating_point():
            return self._contrast(units_ExKxH, targets)
        cosines_E = (units_ExKxH[:, 0] * units_ExKxH[:, 1]).sum(-1)
        if self.settings.score_loss == "cosine":
            return (cosines_E - targets) ** 2
        # CoSENT (Huang et al. 2024, section 3): each pair of examples whose cosines have the wrong order adds a term.
        # All examples have one loss together, which is the loss of each of them here.
        excess_ExE = (cosines_E[:, None] - cosines_E[None, :]) / self.settings.temperature
        excess_ExE = excess_ExE.masked_fill(targets[:, None] >= targets[None, :], -torch.inf)
        return F.pad(excess_ExE.flatten(), (1, 0)).logsumexp(0).expand(len(targets))

    def _contrast(self, units_ExKxH: Tensor, ids_ExK: Tensor) -> Tensor:
        """Return InfoNCE (van den Oord et al. 2018, section 2.3) with in-batch negatives, float32[E].

        Each anchor must find its positive among all positives and negatives. A candidate is left out if it is the same
        text as the anchor or its positive, or the positive of an equal anchor.
        """
        units_ExH, ids_E = units_ExKxH[:, 0], ids_ExK[:, 0]
        # All positives come first, then the negatives.
        candidates_MxH, ids_M = units_ExKxH[:, 1:].transpose(0, 1).flatten(0, 1), ids_ExK[:, 1:].T.flatten()
        scores_ExM = units_ExH @ candidates_MxH.T / self.settings.temperature
        same_ExM = (ids_M[None] == ids_E[:, None]) | (ids_M[None] == ids_ExK[:, 1:2])
        same_ExM[:, : len(ids_E)] |= ids_E[:, None] == ids_E[None]
        own_E = torch.arange(len(ids_E), device=ids_E.device)
        same_ExM[own_E, own_E] = False
        scores_ExM = scores_ExM.masked_fill(same_ExM, -torch.inf)
        losses_E = F.cross_entropy(scores_ExM, own_E, reduction="none")
        if self.settings.symmetric:
            losses_E = (losses_E + F.cross_entropy(scores_ExM[:, : len(ids_E)].T, own_E, reduction="none")) / 2
        return losses_E

    def describe_examples(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        # With CoSENT, no example has a loss of its own.
        joint = targets.is_floating_point() and self.settings.score_loss == "cosent"
        return {} if joint else super().describe_examples(outputs, targets)

    def evaluator(self, prepared: PreparedData, micro_tokens: int, *, padded: bool, multiple: int) -> Evaluator:
        evaluator = super().evaluator(prepared, micro_tokens, padded=padded, multiple=multiple)
        assert isinstance(evaluator, ExampleEvaluator)
        return replace(evaluator, own_names=("spearman",) if _has_scores(prepared) else _RETRIEVAL_FIGURES)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        units_ExKxH = F.normalize(outputs, dim=-1)
        if not targets.is_floating_point():
            return dict(zip(_RETRIEVAL_FIGURES, _retrieve(units_ExKxH, targets), strict=True))
        from scipy import stats

        cosines_E = (units_ExKxH[:, 0] * units_ExKxH[:, 1]).sum(-1)
        constant = cosines_E.min() == cosines_E.max() or targets.min() == targets.max()
        return {"spearman": 0.0 if constant else float(stats.spearmanr(cosines_E, targets)[0])}

    def extra_files(self, network: PreTrainedModel, config: Config) -> Mapping[str, str]:
        return describe_embedding(
            self.settings.pooling, network.config.get_text_config().hidden_size, find_longest(config)
        )

    def usage(self, address: str) -> str:
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{address}")\nembeddings = model.encode(["A text.", "Another text."])'
        )

    @property
    def card_text(self) -> str:
        return (
            "The evaluation uses documents that training did not see. `spearman` compares the cosines of pairs with\n"
            "their scores. `accuracy@1` and `mrr@10` say how well each text finds its pair among all second texts."
        )

    def command(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
        return format_command("embed", folder, "…")


_NAMES = {"text": "anchor", "pair": "positive", "negative": "negative"}


def _has_scores(prepared: PreparedData) -> bool:
    assert prepared.eval.labels is not None
    return prepared.eval.labels.dtype.kind == "f"


def _identify(ids: Sequence[int]) -> int:
    """Return a hash of token ids, int64."""
    content = np.array(ids, np.uint32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _retrieve(units_ExKxH: Tensor, ids_ExK: Tensor) -> tuple[float, float]:
    """Return the share of the anchors that find a positive first, and the mean of 1 / rank up to rank 10.

    Each different anchor is a query, and each different other text a candidate. The rank is that of the best positive
    of the anchor. A candidate as near as that one ranks before it, and the anchor's own text is not a candidate.
    """
    _, first_Q, queries = np.unique(ids_ExK[:, 0].numpy(), return_index=True, return_inverse=True)
    ids_M, first_M, candidates = np.unique(ids_ExK[:, 1:].numpy(), return_index=True, return_inverse=True)
    query_E = torch.from_numpy(queries)
    positive_E = torch.from_numpy(candidates.reshape(len(ids_ExK), -1)[:, 0])
    candidates_MxH = units_ExKxH[:, 1:].flatten(0, 1)[torch.from_numpy(first_M)]
    ranks = []
    for start in range(0, len(first_Q), _ANCHORS_PER_PART):
        part = torch.from_numpy(first_Q[start : start + _ANCHORS_PER_PART])
        cosines_QxM = units_ExKxH[part, 0] @ candidates_MxH.T
        own = (query_E >= start) & (query_E < start + len(part))
        right_QxM = torch.zeros(cosines_QxM.shape, dtype=torch.bool)
        right_QxM[query_E[own] - start, positive_E[own]] = True
        best_Q = cosines_QxM.masked_fill(~right_QxM, -torch.inf).amax(1)
        wrong_QxM = ~right_QxM & (torch.from_numpy(ids_M)[None] != ids_ExK[part, :1])
        ranks.append(1 + ((cosines_QxM >= best_Q[:, None]) & wrong_QxM).sum(1))
    rank_Q = torch.cat(ranks).double()
    return float((rank_Q == 1).double().mean()), float(((rank_Q <= _DEEPEST_RANK) / rank_Q).mean())
