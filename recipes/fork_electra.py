"""Pretrain an encoder with ELECTRA, to tell replaced tokens from real ones: a fork of the loop.

    accelerate launch recipes/fork_electra.py
    accelerate launch recipes/fork_electra.py --data.source my_text.txt --model.config.hidden-size 256

Clark et al. 2020, sections 2 and 3.2. A small generator is a masked LM. Tokens drawn from its predictions replace the
masked tokens in the input of the discriminator, which says of every token whether it was replaced. The discriminator is
the encoder to be fine-tuned later. Both losses are minimised, with no gradient through the draw. --model describes the
discriminator. The generator is a quarter as wide, and both share the embeddings of tokens and positions. The seeds of
dropout also decide the draw. The output folder holds the discriminator, and its folder generator/ the generator. This
recipe has no evaluation and no checkpoints.
"""

from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForPreTraining, PreTrainedTokenizerBase

from minilm import Batch, Config, Data, MaskedLM, Model, Optim, Run, Tokens
from minilm.commands.recipe import run_recipe
from minilm.data.packing import Packing
from minilm.distributed.flops import count_flops
from minilm.distributed.launch import on_all_ranks
from minilm.models.head import freeze_unused
from minilm.models.loading import load_model
from minilm.models.sparse_head import SparseHead
from minilm.optim.optimizer import build_optimizer
from minilm.optim.schedule import learning_rate
from minilm.runs.session import begin, save_networks, start_recording
from minilm.runs.train_result import TrainResult
from minilm.train import load_steps, seed_dropout, train_step

CONFIG = Config(
    data=Data(source="pydocs"),
    tokens=Tokens(vocab_size=2048),
    model=Model(type="electra", config={"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}),
    objective=MaskedLM(rate=0.15),
    batch=Batch(examples=16, max_length=128, layout="blocks"),
    optim=Optim(lr=1e-3, warmup=0.05),
    run=Run(max_steps=2300),
)
# The generator has a quarter of each of these.
WIDTHS = ("hidden_size", "num_attention_heads", "intermediate_size")
# The weight of the discriminator's loss.
WEIGHT = 50.0


def draw(logits_NxV: Tensor) -> Tensor:
    """Draw a token from each row's softmax, int64[N], by the Gumbel-max trick (Maddison et al. 2014, section 2)."""
    return (logits_NxV - torch.empty_like(logits_NxV).exponential_().log()).argmax(-1)


class Electra(nn.Module):
    """The generator and the discriminator, with the sum of their losses."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        settings = config.model
        limits: dict[str, Any] = {"max_length": config.batch.max_length, "seed": config.run.seed}
        if settings.name is not None or settings.type != "electra":
            raise ValueError("both models are new ones of type electra: leave model.name and model.type out")
        discriminator = load_model(settings, tokenizer, auto=AutoModelForPreTraining, **limits)
        quarter = {name: max(1, getattr(discriminator.config, name) // 4) for name in WIDTHS}
        generator = load_model(replace(settings, config={**settings.config, **quarter}), tokenizer, **limits)
        for name in ("word_embeddings", "position_embeddings"):
            setattr(generator.base_model.embeddings, name, getattr(discriminator.base_model.embeddings, name))
        generator.tie_weights()
        self.generator, self.discriminator = SparseHead(generator), SparseHead(discriminator)
        for head in (self.generator, self.discriminator):
            freeze_unused(head)
        self.targets_per_token = torch.zeros(())  # of the whole step; the loop sets it

    def forward(
        self, input_ids_T: Tensor, packing: Packing, target_index_N: Tensor, target_ids_N: Tensor, *rest: None
    ) -> Tensor:
        """Return the sum of both losses.

        `train_step` divides it by the targets of the step. Then the generator's part is a mean over the step's targets,
        and the discriminator's part a mean over its tokens.
        """
        logits_NxV = self.generator.logits(input_ids_T, packing, target_index_N).float()
        generator_nats = F.cross_entropy(logits_NxV, target_ids_N, reduction="sum")
        true_T = input_ids_T.index_copy(0, target_index_N, target_ids_N)
        shown_T = input_ids_T.index_copy(0, target_index_N, draw(logits_NxV.detach()))
        every_T = torch.arange(len(input_ids_T), device=input_ids_T.device)
        logits_T = self.discriminator.logits(shown_T, packing, every_T).float()
        real = float(len(input_ids_T) > 1)  # an empty micro-batch holds one token, which the step does not count
        nats = F.binary_cross_entropy_with_logits(logits_T, (shown_T != true_T).float(), reduction="sum")
        return generator_nats + WEIGHT * self.targets_per_token * nats * real


def train(config: Config, name: str) -> TrainResult:
    with begin(config, name, checkpoints=False) as run:
        accelerator = run.accelerator
        prepared = run.prepared
        max_grad_norm = config.optim.max_grad_norm
        seed = config.run.seed
        with on_all_ranks():
            electra = Electra(config, prepared.tokenizer).to(accelerator.device)
        generator_cost = count_flops(electra.generator, config.batch.max_length)
        discriminator_cost = count_flops(electra.discriminator, config.batch.max_length)
        plan, total, recorder = start_recording(run, electra.discriminator)
        collator = run.objective.collator(
            prepared.tokenizer, prepared.train, seed=seed, padded=plan.padded, multiple=plan.multiple
        )
        model, optimizer = accelerator.prepare(electra, build_optimizer(electra, config.optim, run.precision.name))
        model.train()
        with closing(recorder):
            steps = load_steps(plan, prepared.train, collator, accelerator, range(total), config.batch.workers)
            for step, (global_batch, micro_batches) in enumerate(steps):
                seed_dropout(seed, step, accelerator.process_index)
                targets = float(sum(batch.target_count for batch in micro_batches))
                all_targets = accelerator.reduce(torch.full((), targets, device=accelerator.device))
                electra.targets_per_token = all_targets / global_batch.tokens
                lr = learning_rate(config.optim, step, total)
                result = train_step(accelerator, model, optimizer, micro_batches, lr=lr, max_grad_norm=max_grad_norm)
                generator_flops = generator_cost.step(global_batch, collator.rate(step / total))
                discriminator_flops = discriminator_cost.step(global_batch, 1.0)
                recorder.record_step(
                    epoch=(step + 1) / plan.steps_per_epoch,
                    lr=lr,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    examples=global_batch.examples,
                    tokens=global_batch.tokens,
                    flops=generator_flops + discriminator_flops,
                )
        del model, optimizer
        return save_networks(run, recorder, {".": electra.discriminator.model, "generator": electra.generator.model})


if __name__ == "__main__":
    run_recipe(CONFIG, __doc__, train)
