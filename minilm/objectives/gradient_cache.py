"""GradCache (Gao et al. 2021, section 3): losses that compare the examples of a step, by two passes.

The first pass computes the outputs of all examples. They are gathered over the processes, and the loss of the whole
step gives its gradient at each output. In the second pass, which is the usual one, each micro-batch carries its own
part of the losses and of that gradient. So the update is that of one large batch, for any micro-batch size and any
number of processes.

The memory has room for the activations of one micro-batch. So the first pass keeps those of one, and the second pass
need not compute them again. The other micro-batches are computed twice.

Axes: E examples of a step, K rows of an example, H size of an output, N examples of the micro-batch.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from minilm.data.micro_batch import MicroBatch


def couple_examples(
    accelerator: Accelerator, model: nn.Module, micro_batches: Sequence[MicroBatch]
) -> Sequence[MicroBatch]:
    """Return the micro-batches with `coupling_NxD` if the loss of the model's head compares the examples of a step.

    A step that is one micro-batch of one process needs no coupling, since its loss sees all examples anyway. Several
    processes wait for each other here, to exchange the number of their examples. The first micro-batch comes with its
    outputs, which hold its activations until its backward pass.

    model: the head (`minilm.models.head.Head`) after `accelerator.prepare`, or any other module, for which nothing is
    done.
    """
    head = accelerator.unwrap_model(model)
    rows = getattr(head, "coupled_rows", 0)
    if not rows or (accelerator.num_processes == 1 and len(micro_batches) == 1):
        return micro_batches
    batches = [batch.to(accelerator.device) for batch in micro_batches]

    def run(batch: MicroBatch) -> Tensor:
        outputs: Tensor = model(batch.input_ids_T, batch.packing, batch.target_index_N, None, batch.type_ids_T)
        return outputs

    generators = [accelerator.device] if accelerator.device.type == "cuda" else []
    # The usual pass begins with the same state of the generators. It runs all micro-batches but the first, in the same
    # order, so that it draws the same dropout.
    with torch.random.fork_rng(generators):
        # Autocast keeps copies of the weights, which must not be shared with a pass that has gradients: these copies
        # have none.
        with torch.no_grad(), accelerator.autocast():
            others = [run(batch) for batch in batches[1:]]
        # Gradients are exchanged in the backward pass of the last micro-batch, which may be this one.
        exchanged = len(batches) == 1
        with nullcontext() if exchanged else accelerator.no_sync(model), accelerator.autocast():
            kept = run(batches[0])
    outputs = [kept.detach(), *others]
    sizes = [len(batch.target_ids_N) for batch in batches]
    width = rows * outputs[0].shape[1]
    outputs_ExKH = torch.cat([part.reshape(size, width) for part, size in zip(outputs, sizes, strict=True)])
    ids_E = torch.cat([_get_ids(batch) for batch in batches])
    targets_E = torch.cat([batch.target_ids_N for batch in batches])
    counts = accelerator.gather(torch.tensor([len(ids_E)], device=accelerator.device)).tolist()
    ids_E, targets_E, outputs_ExKH = (_gather(accelerator, own, counts) for own in (ids_E, targets_E, outputs_ExKH))
    # The order must not depend on the cut.
    order_E = ids_E.argsort(stable=True)
    packing = replace(batches[0].packing, lengths=(), rows_per_example=(rows,) * len(ids_E) if rows > 1 else None)
    with torch.enable_grad():
        leaf_ExKH = outputs_ExKH[order_E].requires_grad_()
        losses_E = head.loss(leaf_ExKH.reshape(len(ids_E) * rows, -1), targets_E[order_E], packing)
        (gradient_ExKH,) = torch.autograd.grad(losses_E.sum(), leaf_ExKH)
    coupling_ExD = torch.cat([losses_E.detach()[:, None], gradient_ExKH], dim=1)
    own = slice(first := sum(counts[: accelerator.process_index]), first + sum(sizes))
    parts = torch.split(coupling_ExD[order_E.argsort()][own], sizes)
    coupled = [replace(batch, coupling_NxD=part) for batch, part in zip(batches, parts, strict=True)]
    return [replace(coupled[0], outputs=kept), *coupled[1:]]


def _get_ids(batch: MicroBatch) -> Tensor:
    assert batch.example_ids_N is not None
    return batch.example_ids_N


def _gather(accelerator: Accelerator, own: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all processes, one process after the other. `counts` has the number of rows of each."""
    if accelerator.num_processes == 1:
        return own
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    parts = accelerator.gather(padded[None])
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
