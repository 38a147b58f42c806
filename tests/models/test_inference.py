"""Trained models answer as the pipelines of transformers do."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    pipeline,
)

from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.inference import (
    check_prompts,
    classify,
    escape_line_breaks,
    fill_mask,
    generate,
    load_causal_lm,
    load_classifier,
    load_masked_lm,
)


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def folder(request, documents, tmp_path_factory) -> Path:
    """A tiny BERT whose predictions are far from uniform, with a tokenizer that minilm trained."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(documents, request.param, 400)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.5, **size)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "The quick [MASK] fox.",
        "[MASK] list of names, and a long way to go",
        "If [MASK] file does [MASK] [MASK].",
        "[MASK]",
    ],
)
def test_fills_are_those_of_the_pipeline(text, folder):
    ours = fill_mask(*load_masked_lm(folder), [text], top_k=4)[0]
    theirs = pipeline("fill-mask", model=str(folder))(text, top_k=4)
    single = text.count("[MASK]") == 1
    theirs = [theirs] if single else theirs
    assert len(ours) == text.count("[MASK]")
    for fills, expected in zip(ours, theirs, strict=True):
        assert [fill.token for fill in fills] == [one["token_str"].strip() for one in expected]
        assert [fill.probability for fill in fills] == pytest.approx([one["score"] for one in expected], rel=1e-5)
        if single:
            assert [fill.text for fill in fills] == [one["sequence"].strip() for one in expected]


def test_each_mask_is_filled_alone_and_the_others_stay_in_the_text(folder):
    first, second = fill_mask(*load_masked_lm(folder), ["The [MASK] fox [MASK]."], top_k=1)[0]
    assert first[0].text.count("[MASK]") == second[0].text.count("[MASK]") == 1
    assert first[0].text.index("[MASK]") > second[0].text.index("[MASK]")


def test_several_texts_are_filled_as_each_alone_and_all_the_vocabulary_adds_up_to_one(folder):
    model, tokenizer = load_masked_lm(folder)
    texts = ["The [MASK] fox.", "A [MASK] one, which is longer than the other."]
    assert not model.training
    assert fill_mask(model, tokenizer, texts) == [fill_mask(model, tokenizer, [text])[0] for text in texts]
    every = fill_mask(model, tokenizer, texts[:1], top_k=10**6)[0][0]
    assert len(every) == model.config.vocab_size
    assert sum(fill.probability for fill in every) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"), [("No gap here.", r"no \[MASK\] in the text"), ("word " * 40 + "[MASK]", "longer than")]
)
def test_a_text_that_cannot_be_filled_is_refused_in_one_line(text, message, folder):
    with pytest.raises(ValueError, match=message) as caught:
        fill_mask(*load_masked_lm(folder), [text])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["nothing", "no weights", "garbled weights", "garbled configuration"])
def test_a_folder_that_is_not_a_model_is_refused_in_one_line(broken, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if broken == "no weights":
        (tmp_path / "model.safetensors").unlink()
    elif broken == "garbled weights":
        (tmp_path / "model.safetensors").write_bytes(b"not a header" * 99)
    elif broken == "garbled configuration":
        (tmp_path / "config.json").write_text("{")
    name = tmp_path / "nothing" if broken == "nothing" else tmp_path
    with pytest.raises(ValueError, match="no masked LM can be loaded") as caught:
        load_masked_lm(name)
    assert str(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_without_a_masked_lm_head_is_refused_and_gets_no_random_one(folder, tmp_path):
    model, tokenizer = load_masked_lm(folder)
    model.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no masked LM can be loaded"):
        load_masked_lm(tmp_path)


@pytest.mark.parametrize(
    ("saved", "load", "command"),
    [
        (BertForSequenceClassification, load_masked_lm, "classify"),
        (BertForMaskedLM, load_classifier, "fill-mask"),
        (GPT2ForSequenceClassification, load_causal_lm, "classify"),
        (GPT2LMHeadModel, load_classifier, "generate"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_command_that_takes_it(
    saved, load, command, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400}
    saved(saved.config_class(**small, pad_token_id=0)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    if saved is GPT2ForSequenceClassification:  # its causal LM would tie the head to the embedding
        config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"for a {saved.__name__} use: minilm {command}$"):
        load(tmp_path)


def test_no_texts_give_an_empty_list(folder, causal):
    model, tokenizer = load_masked_lm(folder)
    classifier = BertForSequenceClassification(model.config)
    assert classify(classifier, tokenizer, []) == fill_mask(model, tokenizer, []) == []
    assert classify(classifier, tokenizer, [], []) == generate(*load_causal_lm(causal), []) == []


@pytest.fixture(scope="module")
def causal(documents, tmp_path_factory) -> Path:
    """A tiny GPT-2 whose predictions are far from uniform."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = train_tokenizer(documents, "bpe", 400, causal=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5, "top_p": 0.9, "temperature": 0.7, "seed": 3}, {"temperature": 0}, {"top_k": 0}],
    ids=str,
)
def test_generated_text_is_that_of_the_pipeline_with_the_same_seed(settings, causal):
    ours = generate(*load_causal_lm(causal), ["The quick", "If"], max_new_tokens=12, **settings)
    pipe = pipeline("text-generation", model=str(causal))
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0, **settings}
    seed = drawn.pop("seed", 0)
    if settings.get("temperature") == 0:
        drawn = {"do_sample": False}
    for text, result in zip(["The quick", "If"], ours, strict=True):
        torch.manual_seed(seed)
        assert result == pipe(text, max_new_tokens=12, **drawn)[0]["generated_text"]


def test_another_seed_gives_another_text_and_nothing_begins_a_document(causal):
    model, tokenizer = load_causal_lm(causal)
    first, second = (generate(model, tokenizer, [""], max_new_tokens=20, seed=seed)[0] for seed in (0, 1))
    assert first != second
    assert generate(model, tokenizer, [""], max_new_tokens=20)[0] == first


def test_a_text_that_leaves_no_room_is_refused(causal):
    model, tokenizer = load_causal_lm(causal)
    with pytest.raises(ValueError, match=r"with 39 new ones is more than the model's 40"):
        generate(model, tokenizer, ["The quick brown"], max_new_tokens=39)


def test_without_a_number_no_more_is_generated_than_there_is_room_for(causal):
    model, tokenizer = load_causal_lm(causal)
    text = "The quick brown"
    room = 40 - len(tokenizer(text)["input_ids"])
    settings = {"temperature": 0.0}
    assert generate(model, tokenizer, [text], **settings) == generate(
        model, tokenizer, [text], max_new_tokens=room, **settings
    )


def test_text_that_the_tokenizer_does_not_know_is_reported(causal, caplog):
    model, tokenizer = load_causal_lm(causal)
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(tokenizer("q")["input_ids"][0])
    with caplog.at_level("WARNING", logger="minilm"):
        check_prompts(model, tokenizer, ["qqq", "x"])
        generate(model, tokenizer, ["qqq", "x"], max_new_tokens=1)
    assert [record.message for record in caplog.records] == [
        "3 of the 3 tokens of 'qqq' are unknown to the model's tokenizer"
    ]


def test_line_breaks_are_spelt_out():
    assert escape_line_breaks("a\r\nb") == "a\\r\\nb"


def test_a_masked_lm_is_not_loaded_as_a_causal_lm(folder):
    with pytest.raises(ValueError, match="is not a causal LM; for a BertForMaskedLM use: minilm fill-mask"):
        load_causal_lm(folder)
