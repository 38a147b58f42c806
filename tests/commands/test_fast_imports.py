"""What a command imports and what it leaves out, what is said before an import, and how a command ends."""

import subprocess
import sys

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from minilm.data.tokenizer_training import train_tokenizer
from tests.launch import ROOT

# What only training and evaluation need.
REPORT = "\nprint(*sorted({'datasets', 'pandas'} & set(sys.modules)), file=sys.stderr)"


def python(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def folders(documents, tokenizer, tmp_path_factory) -> dict[str, str]:
    """A small model for each of two commands."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    causal = train_tokenizer(documents, "bpe", 400, causal=True)
    models = {
        "fill-mask": (BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size)), tokenizer),
        "generate": (GPT2LMHeadModel(GPT2Config(vocab_size=len(causal), n_embd=32, n_layer=1, n_head=2)), causal),
    }
    saved = {}
    for name, parts in models.items():
        saved[name] = str(tmp_path_factory.mktemp(name))
        for part in parts:
            part.save_pretrained(saved[name])
    return saved


@pytest.mark.parametrize(
    ("command", "words"),
    [("fill-mask", ("The quick [MASK] fox.",)), ("generate", ("The quick", "--max-new-tokens", "5"))],
)
def test_inference_imports_nothing_that_it_does_not_use_and_answers_as_ever(command, words, folders, run):
    words = (command, folders[command], *words)
    program = "import sys\nfrom minilm.commands.main import main\nmain(sys.argv[1:])"
    done = python(program + REPORT, *words)
    assert done.stderr == "\n", done.stderr
    assert (None, done.stdout.splitlines(), []) == run(*words)


def test_what_takes_time_is_said_before_it_begins():
    program = """
import sys

class Stop:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("torch", "transformers", "accelerate", "datasets"):
            sys.exit(f"found no {name}")

sys.meta_path.insert(0, Stop)
from minilm import Config, Data
from minilm.commands.recipe import run_recipe
run_recipe(Config(data=Data(source="pydocs")))
"""
    assert python(program).stderr.splitlines() == ["importing torch …", "found no torch"]


QUICK_EXIT = """
import atexit, sys
from minilm.commands.recipe import quick_exit

class Large:
    def __del__(self):
        print("destroyed")

large = Large()
with quick_exit():
    atexit.register(print, "the end")
    {work}
"""


@pytest.mark.parametrize(
    ("work", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1), ("1 / 0", 1)]
)
def test_a_command_ends_with_its_status_and_functions_of_libraries_but_without_destructors(work, status):
    done = python(QUICK_EXIT.format(work=work))
    assert (done.stdout, done.returncode) == ("the end\n", status)
