"""The command: what it prints, what it reads, and one line with status 2 for what the user got wrong."""

import gc
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from minilm.commands.fast_imports import quick_imports
from minilm.commands.main import main
from minilm.commands.recipe import exit_on_error
from minilm.data.tokenizer_training import train_tokenizer
from minilm.models.inference import fill_mask, generate, load_causal_lm, load_masked_lm
from minilm.utils.errors import TrainingStopped
from tests.jobs import launched

TEXT, TWO_MASKS = "The quick [MASK] fox.", "If [MASK] file [MASK]."


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, initializer_range=0.5, **size)
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_fill_mask_prints_the_likeliest_first(run, folder):
    status, output, error = run("fill-mask", folder, TEXT, "--top-k", "3")
    fills = fill_mask(*load_masked_lm(folder), [TEXT], top_k=3)[0][0]
    assert (status, error) == (None, [])
    assert [line.split() for line in output] == [
        [f"{fill.probability:.1%}", *fill.token.split(), *fill.text.split()] for fill in fills
    ]


def test_json_is_one_object_for_each_mask_of_each_text(run, folder):
    _, output, _ = run("fill-mask", folder, TEXT, TWO_MASKS, "--json")
    fills = [mask for text in fill_mask(*load_masked_lm(folder), [TEXT, TWO_MASKS]) for mask in text]
    masks = [(TEXT, 0), (TWO_MASKS, 0), (TWO_MASKS, 1)]
    assert [json.loads(line) for line in output] == [
        {"input": text, "mask": mask, "fills": [asdict(fill) for fill in best]}
        for (text, mask), best in zip(masks, fills, strict=True)
    ]


def test_a_dash_reads_a_text_from_each_line_of_standard_input(run, folder):
    lines = f"{TEXT}\n{TWO_MASKS}\n"
    _, given, _ = run("fill-mask", folder, TEXT, TWO_MASKS, "--json")
    for words in (["-"], []):
        _, piped, _ = run("fill-mask", folder, *words, "--json", stdin=lines)
        # Lines have numbers, by which the output is joined to them.
        assert [json.loads(line) for line in piped] == [
            {"row": row, **json.loads(line)} for row, line in zip((0, 1, 1), given, strict=True)
        ]


def test_a_line_ends_at_a_line_feed_alone(folder, capfd, monkeypatch):
    texts = [f"The{mark}quick [MASK] fox." for mark in "\r\v\f\x1c\x85\u2028 "]
    stdin = io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    main(["fill-mask", folder, "-", "-", "--json"])  # the second finds no more
    assert [json.loads(line)["input"] for line in capfd.readouterr().out.split("\n")[:-1]] == texts


@pytest.mark.parametrize("words", [[], ["-"], [""]])
@pytest.mark.parametrize("command", ["fill-mask", "generate", "classify"])
def test_no_text_is_refused_before_anything_is_loaded(command, words, run):
    for stdin in ("", "\r\n\n"):
        status, output, error = run(command, "nowhere", *words, stdin=stdin)
        assert (status, output, len(error)) == (2, [], 1)
        assert error[0].startswith("error: there is no text: ")


def test_a_text_without_a_mask_is_refused_before_anything_is_printed(run, folder):
    status, output, _ = run("fill-mask", folder, TEXT, "No gap here.")
    assert status == 2
    assert output == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill-mask", "nowhere/at-all", TEXT], "nowhere/at-all"),
        (["fill-mask", "FOLDER", "No gap here."], "no [MASK]"),
        (["fill-mask", "EMPTY", TEXT], "no masked LM"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_status_2(words, message, run, folder, tmp_path):
    status, output, error = run(*[{"FOLDER": folder, "EMPTY": str(tmp_path)}.get(word, word) for word in words])
    assert (status, output, len(error)) == (2, [], 1), error
    assert error[0].startswith("error: ")
    assert message in error[0]


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_bad_flag_is_refused_before_anything_is_loaded(value, run):
    status, output, error = run("fill-mask", "nowhere", TEXT, "--top-k", value)
    assert (status, output) == (2, [])
    assert f"'{value}' is not a positive whole number" in error[-1]


def test_debug_shows_the_traceback(run):
    with pytest.raises(ValueError, match="nowhere"):
        run("fill-mask", "nowhere/at-all", TEXT, "--debug")


def fail(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(("rank", "seen"), [(None, True), (0, True), (1, False)])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("column 'x'"), 2, "error: column 'x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TrainingStopped("SIGTERM after step 2", 143), 143, "stopped: SIGTERM after step 2"),
    ],
)
def test_errors_end_with_their_status_and_one_line_per_job(error, status, line, rank, seen, capsys, monkeypatch):
    for name, value in launched(rank).items() if rank is not None else ():
        monkeypatch.setenv(name, value)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)  # how a process of several ends at a signal
    with pytest.raises(SystemExit) as caught:
        exit_on_error(fail(error))
    assert caught.value.code == status
    assert ended in ([], [status])
    assert capsys.readouterr().err.strip() == (line if seen else "")


def test_only_what_the_user_got_wrong_is_caught_and_nothing_under_debug(capsys):
    with pytest.raises(RuntimeError):
        exit_on_error(fail(RuntimeError("a bug")))
    for error in (ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            exit_on_error(fail(error), debug=True)
    exit_on_error(lambda: None)
    assert capsys.readouterr().err == ""


def test_an_error_of_a_library_that_has_a_status_is_a_bug():
    class ResponseError(Exception):
        """An error such as aiohttp's, whose `status` is that of an answer and not of a process."""

        status = 503

    with pytest.raises(ResponseError):
        exit_on_error(fail(ResponseError("unavailable")))


def test_the_command_is_importable_without_torch():
    large = "{'torch', 'transformers', 'datasets', 'accelerate'}"
    program = f"import sys, minilm.commands.main; print(*{large} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout.strip() == b""


def test_nothing_is_collected_while_libraries_are_imported_and_nothing_of_them_later():
    program = """
import gc, sys
from minilm import Config, Data
from minilm.commands.recipe import run_recipe
from minilm.utils.errors import TrainingStopped
seen = []
gc.callbacks.append(lambda phase, info: seen.append(phase) if "torch" in sys.modules else None)
run_recipe(Config(data=Data(source="pydocs")), train_function=lambda config, name: {})
print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(seen))
"""
    words = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout.split()
    assert words[:2] == [b"True", b"True"]
    assert int(words[2]) <= 4  # of two phases each, once they are there


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_is_as_it_was_after_imports(collects):
    was = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with quick_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is collects
    finally:
        (gc.enable if was else gc.disable)()


@pytest.fixture(scope="module")
def causal(documents, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = train_tokenizer(documents, "bpe", 400, causal=True)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=2, n_head=2)
    for part in (GPT2LMHeadModel(config), tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def test_generate_prints_the_text_as_it_comes_and_json_holds_the_same(run, causal):
    words = ("generate", causal, "The quick", "--max-new-tokens", "20", "--top-p", "0.9", "--seed", "4")
    status, output, error = run(*words)
    (expected,) = generate(*load_causal_lm(causal), ["The quick"], max_new_tokens=20, top_p=0.9, seed=4)
    assert (status, error) == (None, [])
    assert output == expected.splitlines()
    _, output, _ = run(*words, "--json")
    assert [json.loads(line) for line in output] == [{"input": "The quick", "text": expected}]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--top-p", "0"), ("--top-p", "1.1"), ("--temperature", "-1"), ("--max-new-tokens", "0"), ("--top-k", "x")],
)
def test_generate_refuses_what_is_out_of_range(flag, value, run, causal):
    status, _, error = run("generate", causal, "The", flag, value)
    assert status == 2
    assert flag in error[-1]


def test_generate_refuses_a_text_that_is_too_long_in_one_line(run, causal):
    status, output, error = run("generate", causal, "The quick", "--max-new-tokens", "40")
    assert (status, output, len(error)) == (2, [], 1)
    assert "more than the model's 40" in error[0]
