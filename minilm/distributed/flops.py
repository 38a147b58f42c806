"""Model FLOPs: the matrix products of a step, counted by their shapes."""

from dataclasses import dataclass

from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minilm.data.batch_plan import Step
from minilm.models.head import Head


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of training on one step: forward and backward (twice the forward), without recomputation.

    A forward costs `per_token` for each real token, `per_square` for the square of each example's length (attention),
    and `per_target` for each target (the head).
    """

    per_token: float
    per_square: float
    per_target: float

    def step(self, step: Step, rate: float) -> float:
        """Return the model FLOPs of a step over all processes. `rate` is the share of its tokens that are targets.

        Padding adds nothing here, so that it lowers the MFU.
        """
        per_token = self.per_token + self.per_target * rate
        forward = per_token * step.tokens + self.per_square * step.square_lengths
        return 3 * forward


def count_flops(head: Head, max_length: int) -> Cost:
    """Count a forward's matrix products at two lengths and two numbers of targets, and solve for the three costs."""
    training = head.training

    def forward(length: int, targets: int) -> int:
        ids_T, packing = head.draw_rows([length])
        # The counter does not know the fused CPU kernel of attention. The plain one saves the scores of all layers for
        # the gradient, so the hooks drop what it saves. (With gradients disabled, the counter fails on DeBERTa.)
        forgetting = saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
        with forgetting, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            head.logits(ids_T, packing, ids_T.new_zeros(targets))
        return int(counter.get_total_flops())

    head.eval()
    short, long = max(2, max_length // 2), max_length
    one, two, at_long = forward(short, 1), forward(short, 2), forward(long, 1)
    per_target = two - one
    at_short, at_long = one - per_target, at_long - per_target
    head.train(training)
    per_square = (at_long / long - at_short / short) / (long - short)
    return Cost(per_token=at_short / short - per_square * short, per_square=per_square, per_target=per_target)
