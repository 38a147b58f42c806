"""What a user can get wrong, and what minilm says to it: `python -m tests.bad_input` prints the table.

`python -m tests.bad_input "missing file"` prints what is said to that.
"""

import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.forks import Entry, outcomes, run_forked, wrong
from tests.mistakes import (
    cached_model,
    damaged_row_group,
    edit,
    in_turn,
    jsonl,
    labelled,
    lower_cased,
    no_bf16,
    no_peft,
    no_permission,
    no_room,
    pickled_weights,
    saved_dataset,
    text,
    truncated,
    truncated_dataset,
    without,
)

LABELLED = "--data.source docs.jsonl --data.column sentence1"
PAIRS = f"{LABELLED} --data.pair-column sentence2"


def classified(prepare: Callable[[], object], says: str, flags: str = PAIRS, **more: object) -> Entry:
    """A mistake about labels or pairs."""
    return Entry(recipe="classify.py", flags=flags, prepare=prepare, says=says, **more)


ENTRIES: dict[str, Entry] = {
    "empty text file": Entry(prepare=text("docs.txt", ""), says="docs.txt"),
    "blank text file": Entry(prepare=text("docs.txt", "\n \n"), says="no document has text"),
    "empty jsonl": Entry(flags="--data.source docs.jsonl", prepare=text("docs.jsonl", ""), says="docs.jsonl"),
    "missing file": Entry(flags="--data.source doc.txt", says="doc.txt: no such file"),
    "second source missing": Entry(flags="--data.source docs.txt doc.txt", says="doc.txt: no such file"),
    "weights and sources differ in number": Entry(
        flags="--data.source docs.txt docs.txt --data.weights 1", says="data.weights takes one number for each source"
    ),
    "missing folder": Entry(flags="--data.source texts/", says="texts/: no such"),
    "folder without matching files": Entry(
        flags="--data.source bert/nothing", prepare=lambda: Path("bert/nothing").mkdir(), says="no file ending in .txt"
    ),
    "unknown column": Entry(
        flags="--data.source docs.jsonl --data.column txet",
        prepare=jsonl("a", "b"),
        says="'txet': did you mean 'text'? There are: text",
    ),
    "unknown column of a second text": classified(
        labelled("yes", "no"), "'sentence3': did you mean 'sentence2'?", LABELLED + " --data.pair-column sentence3"
    ),
    "unknown task of GLUE": Entry(
        flags="--data.source nyu-mll/glue --data.config mprc", says="data.config names the task, not 'mprc': did you"
    ),
    "null for a row": Entry(
        flags="--data.source docs.jsonl", prepare=text("docs.jsonl", "null\n"), says="line 1: null"
    ),
    "None for a text": Entry(flags="--data.source docs.jsonl", prepare=jsonl("a", "b", None), says="line 3"),
    "a number for a text": Entry(flags="--data.source docs.jsonl", prepare=jsonl(3, 4), says="line 1"),
    "a list for a text": Entry(flags="--data.source docs.jsonl", prepare=jsonl(["a"], ["b"]), says="line 1"),
    "text, then a number": Entry(flags="--data.source docs.jsonl", prepare=jsonl("a", 3), says="line 2"),
    "text, then a list": Entry(flags="--data.source docs.jsonl", prepare=jsonl("a", ["b"]), says="line 2"),
    "invalid UTF-8": Entry(prepare=text("docs.txt", b"ok\n\x81\n"), says="docs.txt, line 2: not UTF-8"),
    "invalid UTF-8 in jsonl": Entry(
        flags="--data.source docs.jsonl",
        prepare=text("docs.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
        says="docs.jsonl, line 2",
    ),
    "invalid UTF-8 in csv": Entry(
        flags="--data.source docs.csv", prepare=text("docs.csv", b"text\na\n\x81\n"), says="docs.csv, line 3"
    ),
    "truncated jsonl": Entry(
        flags="--data.source docs.jsonl", prepare=truncated("docs.jsonl"), says="docs.jsonl, line 60"
    ),
    "truncated parquet": Entry(
        flags="--data.source docs.parquet", prepare=truncated("docs.parquet"), says="docs.parquet"
    ),
    "damaged row group": Entry(
        flags="--data.source docs.parquet", prepare=damaged_row_group, says="docs.parquet: row group 1 of 3"
    ),
    "truncated gzip": Entry(
        flags="--data.source docs.txt.gz",
        prepare=lambda: Path("docs.txt.gz").write_bytes(gzip.compress(Path("docs.txt").read_bytes())[:-9]),
        says="docs.txt.gz, after line",
    ),
    "truncated arrow of a saved dataset": Entry(
        flags="--data.source saved",
        prepare=truncated_dataset,
        says="saved/data-00000-of-00001.arrow: not Arrow, or cut",
    ),
    "bad slice of a saved dataset": Entry(
        flags="--data.source saved --data.split train[:5z]",
        prepare=lambda: saved_dataset("saved"),
        says="the split 'train[:5z]' is not written like",
    ),
    "share of a stream": Entry(
        flags="--data.source docs.txt --data.streaming --data.split train[:10%]",
        says="a stream cannot read the part train[:10%]",
    ),
    "stream of pydocs": Entry(flags="--data.source pydocs --data.streaming", says="data.streaming: pydocs cannot"),
    "truncated jsonl, streamed": Entry(
        flags="--data.source docs.jsonl --data.streaming", prepare=truncated("docs.jsonl"), says="docs.jsonl, line 60"
    ),
    "weight 0": Entry(flags="--data.weights 0", says="data.weights must be positive, not 0"),
    "weight that leaves nothing": Entry(flags="--data.weights 0.001", says="documents; give a larger weight"),
    "second source without the column": Entry(
        flags="--data.source docs.jsonl more.jsonl",
        prepare=in_turn(jsonl(*["a word"] * 40), text("more.jsonl", '{"body": "b"}\n' * 40)),
        says="more.jsonl, line 1: no column 'text'",
    ),
    "labels of two types": classified(
        in_turn(labelled(*["yes", "no"] * 20), lambda: os.rename("docs.jsonl", "more.jsonl"), labelled(*[0, 1] * 20)),
        "data.label_column: the labels of the sources differ in type",
        "--data.source docs.jsonl more.jsonl --data.column sentence1 --data.pair-column sentence2",
    ),
    "slice without rows": Entry(flags="--data.source docs.txt --data.split train[5:2]", says="train[5:2]"),
    "slice past the end": Entry(flags="--data.source docs.txt --data.split train[900:]", says="train[900:]"),
    "slice of more than all": Entry(
        flags="--data.source docs.txt --data.split train[:150%]", says="Percent slice boundaries"
    ),
    "one of two evaluation splits unknown": Entry(
        flags="--data.source docs.txt --data.eval-split train[:9]+test", says="no split 'test'"
    ),
    "evaluation split of pydocs": Entry(
        flags="--data.source pydocs --data.eval-split validation", says="data.eval_split: pydocs has no splits"
    ),
    "stream past the end": Entry(
        flags="--data.source docs.txt --data.streaming --data.split train[900:]",
        says="no document has text (split 'train[900:]')",
    ),
    "stream that leaves nothing to evaluate on": Entry(
        flags="--data.source docs.txt --data.streaming --data.eval-fraction 0.001", says="holds out no document"
    ),
    "stream of a weight that leaves nothing": Entry(
        flags="--data.source docs.txt --data.streaming --data.weights 0.001", says="selects no document; give a larger"
    ),
    "stream of an unknown column": Entry(
        flags="--data.source docs.jsonl --data.streaming --data.column txet",
        prepare=jsonl("a", "b"),
        says="'txet': did you mean 'text'?",
    ),
    "stream with a document a file": Entry(
        flags="--data.source docs.txt --data.streaming --data.document file", says="a document cannot be a whole file"
    ),
    "stream of labels": classified(
        labelled(*["yes", "no"] * 20),
        "data.streaming: only language models can read a stream",
        PAIRS + " --data.streaming",
    ),
    "impossible model": Entry(flags="--model.config.num-attention-heads 3", says="model.config: The hidden size"),
    "unknown split": Entry(flags="--data.source docs.txt --data.split test", says="test"),
    "unknown evaluation split": Entry(flags="--data.source docs.txt --data.eval-split validation", says="validation"),
    "bad slice": Entry(flags="--data.source docs.txt --data.split train[:5z]", says="train[:5z]"),
    "nothing to evaluate on": Entry(flags="--data.eval-fraction 0.001", says="leaves no evaluation document"),
    "no mask token": Entry(flags="--model.name bert", prepare=without("mask_token"), says="no mask token"),
    "no pad token": Entry(flags="--model.name bert", prepare=without("pad_token"), says="--tokens.name"),
    "vocabulary larger than the embedding": Entry(
        flags="--model.name small", says="the tokenizer has ids up to 381 and the model's embedding 373 rows"
    ),
    "more tokens than positions": Entry(flags="--model.name bert --batch.max-length 65", says="64 positions"),
    "more tokens than positions in a phase": Entry(
        flags="--model.name bert --run.phases 'start=0.5 max-length=65'",
        says="run.phases, from step 1 on: batch.max_length=65 is more than the model's 64 positions",
    ),
    "more tokens than positions before a phase": Entry(
        flags="--model.name bert --batch.max-length 65 --run.phases 'start=0.5 max-length=48'",
        says="error: batch.max_length=65 is more than the model's 64 positions",
    ),
    "unknown setting of a phase": Entry(
        flags="--run.phases 'start=0.5 lenght=48'", says="the unknown setting 'lenght': did you mean 'max-length'?"
    ),
    "phase without a start": Entry(flags="--run.phases max-length=48", says="has no start"),
    "phase of another value": Entry(
        flags="--run.phases 'start=0.5 max-length=4'", says="batch.max_length must be at least 8 tokens, not 4"
    ),
    "weights of a phase and sources differ in number": Entry(
        flags="--run.phases 'start=0.5 weights=1,2'", says="data.weights takes one number for each source"
    ),
    "phases of a recipe with its own loop": Entry(
        recipe="fork_electra.py",
        flags="--run.phases 'start=0.5 examples=4'",
        says="the loop of this recipe has no phases",
    ),
    "every example too short": Entry(
        flags="--model.name bert", prepare=text("docs.txt", "a\n" * 9), says="hold no target"
    ),
    "model folder missing": Entry(flags="--model.name ./nowhere", says="./nowhere"),
    "model folder empty": Entry(
        flags="--model.name empty", prepare=lambda: Path("empty").mkdir(), says="there is no config.json"
    ),
    "tokenizer folder empty": Entry(
        flags="--tokens.name empty", prepare=lambda: Path("empty").mkdir(), says="there is no tokenizer.json"
    ),
    "model without weights": Entry(
        flags="--model.name bert", prepare=lambda: os.unlink("bert/model.safetensors"), says="bert"
    ),
    "model with another head": Entry(flags="--model.name gpt2", says="gpt2"),
    "encoder without a head": Entry(flags="--model.name encoder", says="start at random", runs=True),
    "classifier": Entry(flags="--model.name classifier", says="start at random", runs=True),
    "corrupt weights": Entry(
        flags="--model.name bert", prepare=text("bert/model.safetensors", b"no header" * 99), says="bert"
    ),
    "truncated weights": Entry(
        flags="--model.name bert", prepare=lambda: os.truncate("bert/model.safetensors", 5000), says="bert"
    ),
    "pickled weights": Entry(flags="--model.name bert", prepare=pickled_weights, says="safetensors"),
    "corrupt model configuration": Entry(flags="--model.name bert", prepare=text("bert/config.json", "{"), says="bert"),
    "corrupt tokenizer": Entry(flags="--model.name bert", prepare=text("bert/tokenizer.json", "{"), says="bert"),
    "unknown model type in a configuration": Entry(
        flags="--model.name bert", prepare=edit("bert/config.json", model_type="brt"), says="brt"
    ),
    "tokenizer missing": Entry(flags="--tokens.name ./nowhere", says="tokenizer './nowhere' cannot be loaded"),
    "unknown kind of tokenizer": Entry(flags="--tokens.kind unigrams", says="unigram"),
    "vocabulary without room for the bytes": Entry(
        flags="--tokens.vocab-size 200", says="tokens.vocab_size must lie in [300"
    ),
    "vocabulary beyond all integers": Entry(flags=f"--tokens.vocab-size {10**30}", says="tokens.vocab_size"),
    "words for a tokenizer that is trained": Entry(
        flags="--tokens.extend 5", says="tokens.extend adds to a tokenizer that exists"
    ),
    "more words than there are": Entry(
        flags="--model.name bert --tokens.extend 5000", says="tokens.extend=5000, but the documents hold"
    ),
    "words beside LoRA": Entry(
        flags="--model.name bert --tokens.extend 1 --model.lora-rank 2",
        prepare=text("docs.txt", "zirconium quartz zirconium quartz\n" * 30),
        says="model.lora_rank would leave the embeddings of 1 new tokens untrained",
    ),
    "negative size": Entry(flags="--model.config.hidden-size -32", says="model.config"),
    "word for a size": Entry(flags="--model.config.hidden-size many", says="model.config"),
    "unknown flag": Entry(flags="--batch.exmples 3", says="--batch.examples"),
    "unknown model type": Entry(flags="--model.type bertt", says="did you mean 'bert'"),
    "unknown model field": Entry(
        flags="--model.name bert --model.config.hiden-size 3", says="did you mean 'hidden_size'"
    ),
    "value of the wrong type": Entry(flags="--batch.examples many", says="many"),
    "label outside 0..n-1": classified(
        in_turn(labelled(0, 3), lambda: os.rename("docs.jsonl", "more.jsonl"), labelled(*[0, 1, 2] * 10)),
        "no training document has '3'. There are: 0, 1, 2",
        PAIRS + " --data.eval-source more.jsonl",
    ),
    "multi-hot lists of two lengths": classified(
        labelled(*[[1.0, 0.0], [0.0, 1.0], [1.0]] * 10), "a multi-hot list has one for each of 2 labels"
    ),
    "a list in place of a class": classified(
        in_turn(labelled([1], [0]), lambda: os.rename("docs.jsonl", "more.jsonl"), labelled(*[0, 1, 2] * 10)),
        "a list is not a single label",
        PAIRS + " --data.eval-source more.jsonl",
    ),
    "a separator between nothing": classified(
        labelled(*["joy", "joy,", "anger", "joy,anger"] * 10),
        "has the label 'joy,', in which a part is empty",
        PAIRS + " --data.label-separator ,",
    ),
    "a separator in lists": classified(
        labelled(*[["joy"], ["anger"]] * 10),
        "holds List(Value('string')), not text to split",
        PAIRS + " --data.label-separator ,",
    ),
    "unseen label": classified(
        in_turn(
            labelled("yes", "maybe"), lambda: os.rename("docs.jsonl", "more.jsonl"), labelled("yes", "no", "yes", "no")
        ),
        "no training document has 'maybe'. There are: no, yes. Give",
        PAIRS + " --data.eval-source more.jsonl",
    ),
    "a single class": classified(labelled(*["yes"] * 20), "all training documents have the label 'yes'"),
    "no label": classified(labelled("yes", None, "no", "no"), "line 2"),
    "no second text": classified(labelled("yes", "no", "no", "no", sentence2=None), "line 2"),
    "hidden labels of a test set": classified(labelled(*[-1] * 20), "-1 stands for a label that is kept secret"),
    "no label column": classified(
        labelled("yes", "no", "no", "no"), "'lable': did you mean 'label'?", PAIRS + " --data.label-column lable"
    ),
    "words for a regression": classified(
        labelled(*["yes", "no"] * 10), "a regression needs numbers", PAIRS + " --objective.problem regression"
    ),
    "labels of a .txt file": classified(lambda: None, "a .txt file has no labels", "--data.source docs.txt"),
    "one sentence column of two": classified(
        labelled(*["yes", "no"] * 20), "WARNING: the column sentence2 is not read", LABELLED, runs=True
    ),
    "a pair for a language model": Entry(
        flags=PAIRS, prepare=labelled(1, 2), says="data.pair_column: a language model reads one text"
    ),
    "classification in blocks": classified(
        labelled("yes", "no", "no", "no"), "batch.layout blocks joins documents", PAIRS + " --batch.layout blocks"
    ),
    "unknown figure": classified(
        labelled(*[0, 1] * 20),
        "run.best_metric 'acuracy': did you mean 'accuracy'?",
        PAIRS + " --run.best-metric acuracy",
    ),
    "weights for several labels": classified(
        labelled(*[["a"], ["a", "b"]] * 20),
        "needs one class for each text",
        PAIRS + " --objective.class-weights balanced",
    ),
    "smoothing of several labels": classified(
        labelled(*[["a"], ["a", "b"]] * 20), "needs one class for each text", PAIRS + " --objective.label-smoothing 0.1"
    ),
    "weights for a regression": classified(
        labelled(*[0.5, 1.5] * 20),
        "needs one class for each text",
        PAIRS + " --objective.problem regression --objective.class-weights balanced",
    ),
    "weights for numbers": classified(
        labelled(*[0.5, 1.5] * 20), "needs one class for each text", PAIRS + " --objective.class-weights balanced"
    ),
    "single labels that are lists": classified(
        labelled(*[["a"], ["b"]] * 20), "--objective.problem", PAIRS + " --objective.problem single-label"
    ),
    "figure of a classification": Entry(
        flags="--run.best-metric accuracy", says="run.best_metric 'accuracy'. There are: bits_per_byte"
    ),
    "0 evaluations of patience": Entry(flags="--run.patience 0", says="run.patience must be at least 1"),
    "0 steps between evaluations": Entry(flags="--run.eval-every 0", says="run.eval_every must be at least 1"),
    "resume and overwrite": Entry(
        flags="--run.resume latest --run.overwrite --run.output-dir run", says="run.resume and run.overwrite exclude"
    ),
    "the best without checkpoints": Entry(
        flags="--run.load-best --run.save-every 0", says="run.load_best needs checkpoints: set run.save_every"
    ),
    "unknown choice": Entry(flags="--batch.layout block", says="blocks"),
    "nothing to freeze": Entry(
        flags="--model.name bert --model.freeze bert.encoder.leyer.0.*", says="did you mean 'bert.encoder.layer.0."
    ),
    "everything frozen": Entry(flags="--model.name bert --model.freeze *", says="leaves nothing to train"),
    "LoRA without peft": Entry(
        flags="--model.name bert --model.lora-rank 2",
        prepare=no_peft,
        says="which is not installed: pip install 'peft>",
    ),
    "LoRA of no such layer": Entry(
        flags="--model.name bert --model.lora-rank 2 --model.lora-targets querry", says="did you mean 'query'"
    ),
    "pattern of LoRA that fits no linear layer": Entry(
        flags="--model.name bert --model.lora-rank 2 --model.lora-targets LayerNorm", says="model.lora_targets"
    ),
    "LoRA of a new model": Entry(flags="--model.lora-rank 2", says="model.lora_rank needs a checkpoint"),
    "LoRA beside frozen layers": Entry(
        flags="--model.name bert --model.lora-rank 2 --model.freeze *.layer.*",
        says="model.freeze: LoRA itself freezes all",
    ),
    "targets of LoRA without a rank": Entry(
        flags="--model.name bert --model.lora-targets query", says="model.lora_targets needs a rank"
    ),
    "LoRA scaled by 0": Entry(
        flags="--model.name bert --model.lora-rank 2 --model.lora-alpha 0", says="model.lora_alpha must be positive"
    ),
    "unknown attention": Entry(flags="--model.name bert --model.attention spda", says="did you mean 'sdpa'"),
    "attention that is not installed": Entry(
        flags="--model.name bert --model.attention flash_attention_2",
        says="cannot use model.attention flash_attention_2",
    ),
    "layer decay 1.5": Entry(flags="--optim.layer-decay 1.5", says="optim.layer_decay must lie in (0, 1]"),
    "label smoothing 1": Entry(
        flags="--objective.label-smoothing 1", says="objective.label_smoothing must lie in [0, 1), not 1"
    ),
    "rate 1.5": Entry(flags="--objective.rate 1.5", says="objective.rate"),
    "final rate 0": Entry(flags="--objective.final-rate 0", says="objective.final_rate must lie in (0, 1]"),
    "masked and replaced, more than all": Entry(
        flags="--objective.masked 0.9 --objective.replaced 0.2", says="sum to more than 1"
    ),
    "unknown unit of masks": Entry(flags="--objective.unit words", says="word"),
    "sample without a mask": Entry(flags="--run.samples no-mask", says="[MASK]"),
    "warm-up without end": Entry(flags="--optim.warmup inf", says="optim.warmup"),
    "decay without end": Entry(flags="--optim.decay inf", says="optim.decay"),
    "final rate of 1.1": Entry(flags="--optim.final-lr 1.1", says="optim.final_lr must lie in [0, 1], not 1.1"),
    "warm-up and decay, more than all": Entry(
        flags="--optim.schedule wsd --optim.warmup 0.3 --optim.decay 0.8", says="are more than all steps together"
    ),
    "inverse-sqrt without a warm-up": Entry(
        flags="--optim.schedule inverse-sqrt --optim.warmup 0", says="optim.warmup must be above 0"
    ),
    "seconds without end": Entry(flags=f"--run.timeout {10**30}", says="run.timeout"),
    "unknown optimizer": Entry(flags="--optim.name moon", says="moon"),
    "no iterations of Muon": Entry(
        flags="--optim.name muon --optim.muon-iterations 0", says="must be at least 1, not 0"
    ),
    "epsilon inf": Entry(flags="--optim.eps inf", says="optim.eps"),
    "weight decay inf": Entry(flags="--optim.weight-decay inf", says="optim.weight_decay"),
    "several processes, missing file": Entry(flags="--data.source doc.txt", says="doc.txt: no such file", processes=2),
    "several processes, unknown flag": Entry(flags="--batch.exmples 3", says="--batch.examples", processes=2),
    "fewer examples than processes": Entry(
        flags="--batch.examples 1", says="batch.examples=1 is less than the 2 processes", processes=2
    ),
    "lr -1": Entry(flags="--optim.lr -1", says="optim.lr"),
    "lr nan": Entry(flags="--optim.lr nan", says="optim.lr"),
    "0 epochs": Entry(flags="--run.epochs 0", says="run.epochs"),
    "output folder not empty": Entry(flags="--run.output-dir bert", says="is not empty"),
    "output folder not writable": Entry(prepare=no_permission, says="out cannot be written"),
    "output folder is a file": Entry(flags="--run.output-dir docs.txt", says="docs.txt cannot be written"),
    "no room for a checkpoint": Entry(prepare=no_room, says="free"),
    "fp16 on a CPU": Entry(flags="--run.precision fp16", says="needs a GPU"),
    "bf16 where it is slow": Entry(flags="--run.precision bf16", prepare=no_bf16, says="WARNING", runs=True),
    "repository of three names": Entry(
        flags="--run.push-to-hub hub/me/model", says="run.push_to_hub takes a repository on the hub, NAME or OWNER/NAME"
    ),
    "license by another name": Entry(
        flags="--run.license Apache-2.0", says="run.license takes the hub's name for a license, such as apache-2.0"
    ),
    "resume from nothing": Entry(flags="--run.resume latest", says="no complete checkpoint"),
    "resume from another folder": Entry(flags="--run.resume bert", says="bert"),
    "resume with another model": Entry(
        flags="--run.resume latest --run.output-dir run --model.name other/model",
        says="model 'other/model' cannot be loaded",
    ),
    "resume with another tokenizer": Entry(
        flags="--run.resume latest --run.output-dir run --tokens.name gpt2 --run.max-steps 3",
        prepare=lower_cased,
        says="the tokenizer has changed",
    ),
    "resume with other documents": Entry(
        flags="--run.resume latest --run.output-dir run --run.max-steps 3",
        prepare=text("docs.txt", "Other words.\n" * 60),
        says="examples",
    ),
    "overwrite, then refused": Entry(
        flags="--run.overwrite --run.output-dir run --data.source nothing.txt", says="nothing.txt"
    ),
    "from a run that is none": Entry(flags="--from-run bert/config.json", says="bert/config.json"),
    "offline, model not in the cache": Entry(
        flags="--model.name some/model",
        says="HF_HUB_OFFLINE",
    ),
    "offline, dataset not in the cache": Entry(
        flags="--data.source some/dataset",
        says="HF_HUB_OFFLINE",
    ),
    "offline, to be published": Entry(
        flags="--run.push-to-hub me/model", says="run.push_to_hub needs the hub, but HF_HUB_OFFLINE is set"
    ),
    "to be published with a token that the hub does not know": Entry(
        flags="--run.push-to-hub me/model", says="the hub does not know the token: log in", hub="server"
    ),
    "hub not reachable, to be published": Entry(
        flags="--run.push-to-hub me/model", says="the hub cannot be reached at http", hub="unreachable"
    ),
    "gated model": Entry(flags="--model.name some/gated", says="gated", hub="server"),
    "gated model, no access": Entry(flags="--model.name some/gated-no-access", says="gated", hub="server"),
    "missing model": Entry(flags="--model.name some/missing", says="some/missing", hub="server"),
    "gated dataset": Entry(flags="--data.source some/gated", says="gated", hub="server"),
    "missing dataset": Entry(flags="--data.source some/missing", says="some/missing", hub="server"),
    "hub not reachable, model": Entry(flags="--model.name some/model", says="reach", hub="unreachable"),
    "hub not reachable, model in the cache": Entry(
        flags="--model.name some/cached",
        prepare=cached_model,
        says="some/cached comes from the cache",
        hub="unreachable",
        runs=True,
    ),
    "hub not reachable, dataset": Entry(flags="--data.source some/dataset", says="reach", hub="unreachable"),
    "hub not reachable, resume with another model": Entry(
        flags="--run.resume latest --run.output-dir run --model.name other/model",
        says="model 'other/model' cannot be loaded",
        hub="unreachable",
    ),
}


def main() -> None:
    if sys.argv[1:2] == ["--fork"]:
        run_forked({name: ENTRIES[name] for name in sys.argv[4:]}, Path(sys.argv[2]), sys.argv[3])
        return
    asked = sys.argv[1:] or list(ENTRIES)
    for name, outcome in outcomes("tests.bad_input", {name: ENTRIES[name] for name in asked}).items():
        line = outcome.line or next((line for line in outcome.error if ENTRIES[name].says in line), "")
        flaws = wrong(ENTRIES[name], outcome)
        print(f"{name} ({outcome.seconds:.1f} s){' WRONG: ' if flaws else ''}{flaws}\n    {line}")


if __name__ == "__main__":
    main()
