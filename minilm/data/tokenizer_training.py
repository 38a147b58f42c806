"""Train a tokenizer on documents: byte-level BPE, WordPiece, Unigram or single characters."""

import io
import logging
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

log = logging.getLogger("minilm")

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
# The sentencepiece library reads a table of tab-separated lines. Tabs and line ends inside words change places with
# characters for private use, and change back in the pieces.
_SWAPS = str.maketrans("\t\n\r\ue000\ue001\ue002", "\ue000\ue001\ue002\t\n\r")
# The sentencepiece library drops a piece that it expects to occur less than 0.5 times. From a short text, it would drop
# all pieces. So a shorter text is repeated until it has about this many characters.
_LEAST_CHARACTERS = 10**4
# The library's time and memory grow with the text. From a longer text, it gets a sample of about this many characters.
_MOST_CHARACTERS = 10**7


def train_tokenizer(
    documents: Documents, kind: str, vocab_size: int, *, causal: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the texts of documents. The same documents give the same tokenizer.

    kind: "bpe" is byte-level BPE (Radford et al. 2019, section 2.2), "wordpiece" is BERT's WordPiece in lower case,
        "unigram" is Unigram (Kudo 2018, section 3.2), and "characters" makes each character a token.
    vocab_size: the largest number of tokens, special tokens included. "characters" ignores it.
    causal: if true, the tokenizer adds no special token to a text, and `<|endoftext|>` ends a document. Otherwise it
        puts `[CLS]` and `[SEP]` around a text, and `[SEP]` between the two texts of a pair and at its end.
    """
    log.info("training a tokenizer …")
    roles = _CAUSAL_SPECIAL if causal else _SPECIAL
    # In BPE and Unigram, a token of a word includes the space before the word. So the mask takes that space too, as
    # RoBERTa's does.
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
    """Train a tokenizer of the tokenizers library. The library draws progress bars if stderr is a terminal."""
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

    # The trainer numbers the ## letters in an order that differs from run to run, and the numbers decide between
    # equally good merges. So learn the letters first, and give them sorted to the trainer as if they were special
    # tokens. Then build the tokenizer anew from the vocabulary, where they are not special.
    tokenizer = empty()
    _train_on(documents, tokenizer, trainers.WordPieceTrainer(vocab_size=1, show_progress=False))
    letters = sorted(token for token in tokenizer.get_vocab() if token.startswith("##"))
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *letters])
    _train_on(documents, tokenizer, trainer)
    tokenizer = empty(tokenizer.get_vocab())
    tokenizer.add_special_tokens(special)
    return tokenizer


def _train_unigram(documents: Documents, vocab_size: int, special: list[AddedToken], unknown: str) -> Tokenizer:
    """Train Unigram as SentencePiece does: a space is U+2581, and a character without a piece is spelt in bytes."""
    names = [*(token.content for token in special), *(f"<0x{byte:02X}>" for byte in range(256))]
    # "<" is always a word of its own. Otherwise "<0x0A>" in a text would be taken for the byte of that name.
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
    """Return at most `size` pieces of the words, with their log probabilities, learnt by sentencepiece.

    There are fewer pieces if the words do not yield more. The pieces use only the `size` most frequent characters.
    words: the number of times that each word occurs. The result does not depend on their order.
    """
    words = Counter({word.translate(_SWAPS): count for word, count in words.items()})
    letters: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
    for reserved in "\0\t\n\r\u2585":
        del letters[reserved]
    frequent = sorted(letters, key=lambda letter: (-letters[letter], letter))[:size]
    if not frequent:
        return []
    # Cut words at rare characters, and also into at most 1,000 characters, because the library leaves out a line of
    # more than 4,192 bytes.
    pattern, parts = re.compile(f"[{re.escape(''.join(frequent))}]{{1,1000}}"), Counter[str]()
    for word, count in words.items():
        for part in pattern.findall(word):
            parts[part] += count
    total = sum(len(part) * count for part, count in parts.items())
    repeats, divisor = max(1, _LEAST_CHARACTERS // total), math.ceil(total / _MOST_CHARACTERS)
    # The checksum decides which rare parts are in a sample, so that their order does not matter.
    sample = {part: (repeats * count + zlib.crc32(part.encode()) % divisor) // divisor for part, count in parts.items()}
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(f"{part}\t{count}" for part, count in sorted(sample.items()) if count),
        input_format="tsv",
        model_writer=model,
        # One more, for the unknown token.
        vocab_size=size + 1,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        eos_id=-1,
        # The number of threads decides the order of sums, and so their rounding.
        num_threads=1,
        minloglevel=2,
    )
    processor = SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(1, len(processor))
    return [(processor.id_to_piece(index).translate(_SWAPS), processor.get_score(index)) for index in ids]
