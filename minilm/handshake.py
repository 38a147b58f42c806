"""Run by each process that `minilm doctor` launches: they add up their ranks over gloo, and the first tells the sum."""

from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    """Join the group that the launcher's environment describes, and leave it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, sum {int(total)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
