"""Small files in the layout of GLUE's original downloads."""

from collections.abc import Sequence
from pathlib import Path

from minilm.data.glue import TASKS

# The first row of each file of GLUE, and a row that stands for all. CoLA has no header.
LAYOUTS: dict[str, tuple[str, str]] = {
    "cola": ("", "gj04\t{label}\t*\t{first}"),
    "sst2": ("sentence\tlabel", "{first}\t{label}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t{id}\t7{id}\t{first}\t{second}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{id}\t1\t2\t{first}\t{second}\t{label}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{id}\tnews\tf\t2012\t1\tnone\tnone\t{first}\t{second}\t{label}",
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{id}\t3\t4\tfiction\t( a )\t{first}\t{second}\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "{id}\t{first}\t{second}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{id}\t{first}\t{second}\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "{id}\t{first}\t{second}\t{label}"),
}
LABELS = {"stsb": ("0.000", "3.25"), "mnli": ("entailment", "neutral"), "rte": ("entailment", "not_entailment")}
# Quotes that a reader with quoting would take for the borders of fields that hold several lines.
TEXTS = ('"An open quote', "plain", 'The "second" one', 'It ends" here', '""', "naïve \\N text, with; commas")


def write_task(root: Path, name: str, *, rows: Sequence[str] = TEXTS) -> Path:
    """Write the files of a task of GLUE below `root`, and return its folder."""
    task, (header, row) = TASKS[name], LAYOUTS[name]
    labels = LABELS.get(name, ("0", "1"))
    folder = root / task.title
    folder.mkdir(parents=True)
    for split in ("train", *task.eval_splits):
        lines = [header] if header else []
        for number, text in enumerate(rows):
            label = labels[number % 2]
            lines.append(row.format(id=number, first=text, second=f"{split} {text[::-1]}", label=label))
        path = folder / f"{split.replace('validation', 'dev')}.tsv"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder
