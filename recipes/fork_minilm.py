"""Distil a BERT-like encoder into a smaller one that relates its tokens as the teacher does: a fork of the loop.

    accelerate launch recipes/fork_minilm.py
    accelerate launch recipes/fork_minilm.py --model.name TEACHER --data.source my_text.txt

MiniLMv2 (Wang et al. 2021, section 3.1). In one layer of each model, the queries are cut into the same number of
relation heads, which need not be the attention heads. The student's softmax(q q^T / sqrt(d)) is trained to match the
teacher's. Keys and values are treated likewise. --model.name is the teacher; the other --model flags describe the
student, which is saved without a head. This recipe writes no checkpoints.
"""

import math
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from minilm import Config, Model, Optim, Run
from minilm.commands.recipe import run_recipe
from minilm.data.micro_batch import collate_all_targets
from minilm.data.packing import Packing, RowGroup
from minilm.distributed.flops import count_flops
from minilm.distributed.launch import on_all_ranks
from minilm.models.head import Head, freeze_unused
from minilm.models.loading import load_model
from minilm.models.sparse_head import SparseHead
from minilm.models.temporary_changes import evaluation_mode
from minilm.optim.optimizer import build_optimizer
from minilm.optim.schedule import learning_rate
from minilm.runs.session import begin, save_networks, start_recording
from minilm.runs.train_result import TrainResult
from minilm.train import load_steps, seed_dropout, train_step

CONFIG = Config(
    model=Model(
        name="google-bert/bert-base-uncased",
        type="bert",
        config={"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    optim=Optim(lr=6e-4, betas=(0.9, 0.98), warmup=0.01),
    run=Run(epochs=5),
)
# The number of relation heads, which must divide both widths. The paper uses more than the models' attention heads.
HEADS = 12
# The teacher's last layer, as for the paper's base models. Its large models use an earlier one.
TEACHER_LAYER = -1
STATES = ("query", "key", "value")


def divergence(student_TxH: Tensor, teacher_TxH: Tensor, group: RowGroup) -> Tensor:
    """Return KL(teacher || student) of softmax(x x^T / sqrt(d)) at the group's tokens, the mean of A=HEADS heads."""
    log_p = []
    for x_TxH in (student_TxH, teacher_TxH):
        x_RxAxLxD = group.pad(x_TxH.view(len(x_TxH), HEADS, -1)[group.start : group.stop]).transpose(1, 2)
        scores = (x_RxAxLxD @ x_RxAxLxD.transpose(-1, -2)).float() / math.sqrt(x_RxAxLxD.shape[-1])
        bias = group.attention_bias(None, scores)  # hides padding
        log_p.append((scores if bias is None else scores + bias.clamp(min=-1e9)).log_softmax(-1))
    return group.unpad(F.kl_div(log_p[0], log_p[1], reduction="none", log_target=True).sum(-1).mean(1))


class Distiller(Head):
    """A student and its teacher, with the divergence between their relations as the loss."""

    summary = "relations of queries, keys and values"

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__(student)
        self.student, self.teacher_head = SparseHead(student), SparseHead(teacher).requires_grad_(False)
        self.padding_free, self._kept = self.student.padding_free and self.teacher_head.padding_free, list[Tensor]()
        if not self.padding_free:
            raise ValueError("this recipe takes models that need no padding: leave model.attention at auto")
        for model, layer in ((student, -1), (teacher, TEACHER_LAYER)):
            attention = [module for module in model.modules() if all(hasattr(module, name) for name in STATES)]
            if not attention or model.config.hidden_size % HEADS:
                raise ValueError(f"{type(model).__name__} is not like BERT, or its width is not a multiple of {HEADS}")
            for name in STATES:
                attention[layer].get_submodule(name).register_forward_hook(lambda m, x, y: self._kept.append(y[0]))

    def _states(self, head: SparseHead, input_ids_T: Tensor, packing: Packing) -> list[Tensor]:
        self._kept = []
        head.logits(input_ids_T, packing, input_ids_T.new_zeros(1))  # one target, so that the head costs almost nothing
        return self._kept

    def logits(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, type_ids_T: Tensor | None = None
    ) -> Tensor:
        """Return at each target the sum of the divergences of queries, keys and values, in nats, float32[N].

        These take the place of logits.
        """
        with evaluation_mode(self.teacher_head):
            teacher_states = self._states(self.teacher_head, input_ids_T, packing)
        pairs = zip(self._states(self.student, input_ids_T, packing), teacher_states, strict=True)
        kinds = [torch.cat([divergence(*pair, group) for group in packing.groups]) for pair in pairs]
        return torch.stack(kinds).sum(0)[target_index_N]

    def forward(self, ids_T: Tensor, packing: Packing, index_N: Tensor, *rest: Tensor | None) -> Tensor:
        return self.logits(ids_T, packing, index_N)


def train(config: Config, name: str) -> TrainResult:
    with begin(config, name, checkpoints=False) as run:
        accelerator = run.accelerator
        prepared = run.prepared
        max_grad_norm = config.optim.max_grad_norm

        def load(model: Model) -> PreTrainedModel:
            return load_model(model, prepared.tokenizer, max_length=config.batch.max_length, seed=config.run.seed)

        student, teacher = replace(config.model, name=None), replace(config.model, config={})
        with on_all_ranks():
            distiller = Distiller(load(student), load(teacher)).to(accelerator.device)
        freeze_unused(distiller)
        cost = count_flops(distiller.student, config.batch.max_length)
        plan, total, recorder = start_recording(run, distiller)
        model, optimizer = accelerator.prepare(distiller, build_optimizer(distiller, config.optim, run.precision.name))
        model.train()
        with closing(recorder):
            steps = load_steps(
                plan, prepared.train, collate_all_targets, accelerator, range(total), config.batch.workers
            )
            for step, (global_batch, micro_batches) in enumerate(steps):
                seed_dropout(config.run.seed, step, accelerator.process_index)
                lr = learning_rate(config.optim, step, total)
                result = train_step(accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=max_grad_norm)
                recorder.record_step(
                    epoch=(step + 1) / plan.steps_per_epoch,
                    lr=lr,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    examples=global_batch.examples,
                    tokens=global_batch.tokens,
                    flops=cost.step(global_batch, 0.0),
                )
        del model, optimizer
        return save_networks(run, recorder, {".": distiller.model.base_model})


if __name__ == "__main__":
    run_recipe(CONFIG, __doc__, train)
