"""Checkpoints in parts: all parts together are the checkpoint that one process would write, and none may be missing."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForMaskedLM, BertForMaskedLM, PreTrainedTokenizerBase

from minilm.commands.export import export_model
from minilm.commands.merge import merge_models
from minilm.config import Config, Model, Optim, Run
from minilm.models.lora import add_lora
from minilm.optim.optimizer import build_optimizer
from minilm.runs import checkpoint_parts, checkpoint_saver
from minilm.runs.checkpoint import Progress, find_complete_checkpoints, read_checkpoint
from minilm.runs.checkpoint_parts import FIRST_UNIT, assign_parts, check_parts, find_parts, name_part
from minilm.runs.checkpoint_saver import CheckpointSaver
from minilm.runs.optimizer_state import collect_optimizer_state
from minilm.runs.resume import restore_state
from minilm.runs.state_tensors import gather_full_state, load_tensors
from tests.checkpoints import INPUTS, MANIFEST, MOMENTS, WEIGHTS, facts, names, network
from tests.jobs import fork

INDEX = f"{WEIGHTS}.index.json"


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 100), min_size=1), st.data())
def test_every_unit_has_a_part_no_part_is_empty_and_all_have_about_the_same_size(sizes, data):
    parts = data.draw(st.integers(1, len(sizes)))
    assigned = assign_parts(sizes, parts)
    loads = [sum(sizes[name] for name in sizes if assigned[name] == part) for part in range(parts)]
    assert assigned.keys() == sizes.keys()
    assert set(assigned.values()) == set(range(parts))
    assert max(loads) <= sum(sizes.values()) / parts + max(sizes.values()) + len(sizes)
    assert assigned.get(FIRST_UNIT, 0) == 0
    assert assign_parts(dict(reversed(sizes.items())), parts) == assigned


@given(st.integers(1, 300), st.data())
def test_parts_are_found_in_order_and_a_missing_one_is_named(parts, data):
    listed = [name_part(WEIGHTS, part, parts) for part in range(parts)]
    others = [INDEX, MOMENTS, "model-1-of-2.safetensors", f"{name_part(WEIGHTS, 0, 2)}.tmp"]
    shuffled = data.draw(st.permutations([*listed, *others]))
    assert find_parts(shuffled, WEIGHTS) == listed
    check_parts(shuffled, WEIGHTS)
    missing = data.draw(st.sampled_from(listed))
    shuffled.remove(missing)
    with pytest.raises(ValueError, match=r"is not in its manifest\.json") as caught:
        check_parts(shuffled, WEIGHTS)
    assert missing in str(caught.value)


def build(
    tokenizer: PreTrainedTokenizerBase, kind: str, *, sharded: bool = False
) -> tuple[BertForMaskedLM, torch.optim.Optimizer]:
    """A network and its optimizer.

    The embeddings are tied, there are two token types, and three processes do not divide the vocabulary.
    """
    model = network(tokenizer)
    if kind == "lora":
        add_lora(model, Model(name="base", lora_rank=2), (), "MaskedLM")
    optimizer = build_optimizer(model, Optim(name="muon" if kind == "muon" else "adamw", lr=0.1))
    if sharded:
        before = {parameter: name for name, parameter in model.named_parameters()}
        for layer in (*model.bert.encoder.layer, model):
            fully_shard(layer)
        after = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"][:] = [after[before[parameter]] for parameter in group["params"]]
    return model, optimizer


def update(model: BertForMaskedLM, optimizer: torch.optim.Optimizer) -> None:
    """Make one update, with a gradient that does not depend on how the network is divided."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        whole = torch.randn(parameter.shape, generator=generator)
        if parameter.requires_grad and isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        elif parameter.requires_grad:
            parameter.grad = whole
    optimizer.step()


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to_local() if isinstance(x, DTensor) else x for name, x in tensors.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**model.state_dict(keep_vars=True), **collect_optimizer_state(optimizer, model)}  # type: ignore[arg-type]


@contextmanager
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_parts, "PART_BYTES", 1)
        yield


def saver_of(model: BertForMaskedLM, optimizer: torch.optim.Optimizer, tokenizer, folder: Path) -> CheckpointSaver:
    main = PartialState().is_main_process
    config = Config(run=Run(save_every=1, timeout=60))
    return CheckpointSaver(folder, model, optimizer, tokenizer, config, INPUTS, main=main)


def write_sharded(tokenizer, folder: Path, kind: str, steps: int, blind: int | None) -> int:
    """One process of a job that writes checkpoints in parts, and checks what it can see of them.

    blind: the rank of a process that does not see the folder, as if it were on another host.
    """
    PartialState(cpu=True)
    if dist.get_rank() == blind:
        is_dir = Path.is_dir
        Path.is_dir = lambda self: not self.name.startswith(".probe") and is_dir(self)  # type: ignore[assignment]
    model, optimizer = build(tokenizer, kind, sharded=True)
    update(model, optimizer)
    saver = saver_of(model, optimizer, tokenizer, folder)
    kept: list[int] = []

    def count(tensors, chosen, real=checkpoint_saver.gather_tensors):
        result = real(tensors, chosen)
        kept.append(sum(tensor.nbytes for tensor in {id(x): x for x in result.values()}.values()))
        return result

    checkpoint_saver.gather_tensors = count
    with small_parts():
        for step in range(1, steps + 1):
            saver.save(Progress(step=step))
            saver.wait()
    whole = gather_full_state(state_of(model, optimizer), keep=True)
    total = sum(tensor.nbytes for tensor in {id(x): x for x in whole.values()}.values())
    largest = max(tensor.nbytes for tensor in whole.values())
    # No process holds much more than its share.
    writers = dist.get_world_size() - (blind is not None)
    assert sum(kept) / steps <= (0 if dist.get_rank() == blind else total / writers + 3 * largest)
    dist.barrier()
    fresh, again = build(tokenizer, kind, sharded=True)
    restore_state(read_checkpoint(folder / "checkpoint-1"), fresh, again)
    assert same(local(state_of(fresh, again)), local(state_of(model, optimizer)))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def write_in_parts(
    tokenizer, folder: Path, kind: str, processes: int, steps: int = 1, blind: int | None = None
) -> Path:
    folder.mkdir()
    children = fork(lambda: write_sharded(tokenizer, folder, kind, steps, blind), folder.parent / "stderr", processes)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]) for child in children]
    assert statuses == [0] * processes, (folder.parent / "stderr").read_text()
    return folder / "checkpoint-1"


@pytest.mark.scorecard(3)
@pytest.mark.parametrize("kind", ["adamw", "muon", "lora"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_parts_of_a_sharded_model_are_to_the_bit_what_one_process_writes(kind, processes, tokenizer, tmp_path):
    folder = write_in_parts(tokenizer, tmp_path / "out", kind, processes)
    assert names(tmp_path / "out") == ["checkpoint-1"]
    for name in (WEIGHTS, MOMENTS):
        assert len(find_parts(names(folder), name)) == processes
    model, optimizer = build(tokenizer, kind)
    update(model, optimizer)
    (tmp_path / "one").mkdir()
    saver = saver_of(model, optimizer, tokenizer, tmp_path / "one")
    saver.save(Progress(step=1))
    saver.wait()
    one = tmp_path / "one" / "checkpoint-1"
    assert load_tensors(folder, WEIGHTS).keys() == load_tensors(one, WEIGHTS).keys()
    # Muon's sums over shards are taken in another order.
    for name in (WEIGHTS, MOMENTS):
        ours, theirs = load_tensors(folder, name), load_tensors(one, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5 if kind == "muon" else 0)
    # One process goes on from it, and transformers reads it.
    restored, again = build(tokenizer, kind)
    restore_state(read_checkpoint(folder), restored, again)
    plain = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
    assert same({name: plain[name] for name in load_tensors(folder, WEIGHTS)}, load_tensors(folder, WEIGHTS))
    assert same(collect_optimizer_state(again, restored), load_tensors(folder, MOMENTS))
    export_model(folder, tmp_path / "alone", "safetensors")
    assert same(AutoModelForMaskedLM.from_pretrained(tmp_path / "alone").state_dict(), plain)


@pytest.mark.parametrize(("processes", "blind", "written"), [(3, 1, 2), (2, 1, 1)])
def test_a_process_that_does_not_see_the_folder_writes_no_part(processes, blind, written, tokenizer, tmp_path):
    folder = write_in_parts(tokenizer, tmp_path / "out", "adamw", processes, blind=blind)
    assert len(find_parts(names(folder), WEIGHTS)) == len(find_parts(names(folder), MOMENTS)) == written
    assert names(tmp_path / "out") == ["checkpoint-1"]


@pytest.fixture(scope="module")
def parts(tokenizer, tmp_path_factory) -> Path:
    """An output folder with two checkpoints in two parts."""
    place = tmp_path_factory.mktemp("parts")
    return write_in_parts(tokenizer, place / "out", "adamw", 2, steps=2).parent


def test_checkpoints_in_parts_can_be_merged(parts, tmp_path):
    checkpoints = find_complete_checkpoints(parts)
    assert len(checkpoints) == 2
    merged = merge_models(checkpoints, tmp_path / "merged")
    assert same(load_file(merged / WEIGHTS), load_tensors(checkpoints[0], WEIGHTS))


def test_the_index_names_the_part_of_each_weight(parts):
    folder = parts / "checkpoint-1"
    index = json.loads((folder / INDEX).read_text())
    held = {name: part for part in find_parts(names(folder), WEIGHTS) for name in load_file(folder / part)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in load_tensors(folder, WEIGHTS).values())


@pytest.mark.scorecard(15)
def test_damage_in_any_part_is_refused_with_its_name(parts, tmp_path):
    for name in names(parts / "checkpoint-1"):
        if name == MANIFEST:
            continue
        for damage in ("flipped", "missing", "not listed"):
            folder = Path(shutil.copytree(parts / "checkpoint-1", tmp_path / damage / name))
            path = folder / name
            if damage == "flipped":
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 1
                path.write_bytes(content)
            elif damage == "missing":
                path.unlink()
            else:
                listed = [other for other in names(folder) if other not in (name, MANIFEST)]
                (folder / MANIFEST).write_text(json.dumps({other: facts(folder / other) for other in listed}))
                if not name.startswith(("model", "optimizer", "training")):
                    continue  # it is not read then
            with pytest.raises(ValueError, match="not a usable checkpoint") as caught:
                read_checkpoint(folder)
            assert name in str(caught.value).replace(str(folder), "")
