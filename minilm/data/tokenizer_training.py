"""Train a tokenizer on documents: byte-level BPE, WordPiece, Unigram or single characters."""

import io
import math
import re
import sys
import zlib
from collections import Counter

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minilm.data.document_texts import Documents, count_texts, iterate_texts
from minilm.utils.output_streams import silence_stdout
from minilm.utils.progress import show_progress

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_CAUSAL_SPECIAL = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|unknown|>",
}
# The sentencepiece library reads lines of cells: these stand for the characters that end them, and the reverse.
_STAND_INS = str.maketrans("\t\n\r\ue000\ue001\ue002", "\ue000\ue001\ue002\t\n\r")
# It needs time and memory for every character, and drops what it would use less than half a time: of a few words, all.
_CHARACTERS = 10**4, 10**7


def train_tokenizer(
    documents: Documents, kind: str, vocab_size: int, *, causal: bool = False
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (Radford et al. 2019, section 2.2), WordPiece (as BERT's, lower-cased) or Unigram (Kudo
    2018, section 3.2) on `text`, or take every character for a token. The same documents give the same tokenizer.

    For masked LM it adds `[CLS]` and `[SEP]` around one text, and between and after two. A `causal` one adds nothing:
    it has one special token, which ends a document.
    """
    roles = _CAUSAL_SPECIAL if causal else _SPECIAL
    # In BPE and Unigram, as in RoBERTa's, " [MASK]" stands for " word": the mask takes the space before it.
    names = dict.fromkeys(roles.values())
    special = [AddedToken(name, special=True, lstrip=name == "[MASK]" and kind in ("bpe", "unigram")) for name in names]
    if kind == "bpe":
        tokenizer = _train_bpe(documents, vocab_size, special)
    elif kind == "wordpiece":
        tokenizer = _train_wordpiece(documents, vocab_size, special, roles["unk_token"])
    elif kind == "unigram":
        tokenizer = _train_unigram(documents, vocab_size, special, roles["unk_token"])
    else:
        tokenizer = _collect_characters(documents, special, roles["unk_token"])
    if not causal:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


def _collect_characters(documents: Documents, special: list[AddedToken], unknown: str) -> Tokenizer:
    characters = sorted({character for text in iterate_texts(documents) for character in set(text)})
    vocabulary = {token: index for index, token in enumerate([*(t.content for t in special), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _train_on(documents: Documents, tokenizer: Tokenizer, trainer: trainers.Trainer) -> None:
    """Train a tokenizer of the tokenizers library, which draws its bars on stderr if that is a terminal."""
    with silence_stdout():
        tokenizer.train_from_iterator(iterate_texts(documents), trainer, length=count_texts(documents))
    if sys.stderr.isatty():
        # The library leaves the cursor behind its last bar. Remove that bar, so that the next line begins on the left.
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _train_bpe(documents: Documents, vocab_size: int, special: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    _train_on(documents, tokenizer, trainer)
    return tokenizer


def _train_wordpiece(documents: Documents, vocab_size: int, special: list[AddedToken], unknown: str) -> Tokenizer:
    def empty(vocabulary: dict[str, int] | None = None) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    # The trainer numbers the ## letters, which decide ties, in an order that differs from run to run. So learn them
    # first, hand them over sorted as if they were special, and build the tokenizer anew from the vocabulary.
    tokenizer = empty()
    _train_on(documents, tokenizer, trainers.WordPieceTrainer(vocab_size=1, show_progress=False))
    letters = sorted(token for token in tokenizer.get_vocab() if token.startswith("##"))
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *letters])
    _train_on(documents, tokenizer, trainer)
    tokenizer = empty(tokenizer.get_vocab())
    tokenizer.add_special_tokens(special)
    return tokenizer


def _train_unigram(documents: Documents, vocab_size: int, special: list[AddedToken], unknown: str) -> Tokenizer:
    """As SentencePiece does: spaces are U+2581, and what has no piece is spelt in bytes, so that no text is lost."""

    names = [*(token.content for token in special), *(f"<0x{byte:02X}>" for byte in range(256))]
    # The "<" stands alone, so that a text with "<0x0A>" in it is not taken for the byte of that name.
    spaces = pre_tokenizers.Metaspace(prepend_scheme="never")
    splitter, words = pre_tokenizers.Sequence([pre_tokenizers.Split("<", "isolated"), spaces]), Counter[str]()
    for text in show_progress(
        iterate_texts(documents), desc="reading", total=count_texts(documents), unit="text", leave=False
    ):
        words.update(word for word, _ in splitter.pre_tokenize_str(text))
    best = _learn_pieces(words, vocab_size - len(names))
    lowest = min((score for _, score in best), default=0.0)
    pieces = [*((name, lowest) for name in names), *best]
    tokenizer = Tokenizer(models.Unigram(pieces, names.index(unknown), byte_fallback=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return tokenizer


def _learn_pieces(words: Counter[str], size: int) -> list[tuple[str, float]]:
    """At most `size` pieces that spell the words, with their log probabilities, by the sentencepiece library.

    There are fewer where the words give no more, and none of a character that is not among the `size` most frequent.
    Of more text than `_CHARACTERS` says a sample is taken, which depends on the words and their counts alone.
    """
    words = Counter({word.translate(_STAND_INS): count for word, count in words.items()})
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    for reserved in "\0\t\n\r\u2585":
        del letters[reserved]
    kept = sorted(letters, key=lambda letter: (-letters[letter], letter))[:size]
    if not kept:
        return []
    spelt, parts = re.compile(f"[{re.escape(''.join(kept))}]{{1,1000}}"), Counter[str]()
    for word, count in words.items():
        for part in spelt.findall(word):  # the library leaves out a line of more than 4192 bytes
            parts[part] += count
    fewest, most = _CHARACTERS
    total = sum(len(part) * count for part, count in parts.items())
    times, share = max(1, fewest // total), math.ceil(total / most)
    sample = {part: (times * count + zlib.crc32(part.encode()) % share) // share for part, count in parts.items()}
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(f"{part}\t{count}" for part, count in sorted(sample.items()) if count),
        input_format="tsv",
        model_writer=trained,
        vocab_size=size + 1,  # one is for what is unknown
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,  # the order of its sums depends on how many there are
        minloglevel=2,
    )
    learned = SentencePieceProcessor(model_proto=trained.getvalue())
    ids = range(1, len(learned))
    return [(learned.id_to_piece(index).translate(_STAND_INS), learned.get_score(index)) for index in ids]
