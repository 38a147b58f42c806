"""Flags of other training programs, each with the flag of minilm for the same purpose.

They are those of transformers' TrainingArguments and example scripts, litgpt, torchtitan and nanoGPT. This file does
not import torch.
"""

import dataclasses
from collections.abc import Sequence

from minilm.config import Config

_STEP = "--batch.examples, the examples of a step over all processes and micro-batches"
_MICRO = "--batch.micro-tokens, the tokens of a forward pass (or auto)"
_LENGTH = "--batch.max-length, in tokens"
_EVERY = "--run.eval-every, in steps"
_SAVE = "--run.save-every, in steps"
_WARMUP = "--optim.warmup: a share of the steps if below 1, else a number of steps"
_DECAY = "--optim.decay, with --optim.schedule wsd: a share of the steps if below 1, else a number of steps"
_LAUNCHER = "a flag of the launcher: accelerate launch --multi_gpu --num_processes N recipes/…"
_CONFIG = "--model.config.FIELD, a field of the Hugging Face configuration"
_LOGGED = "not needed: log.jsonl in the output folder has one line per step"

# Flags of other programs, each with the answer to a user who types it. An answer that begins with -- is minilm's flag.
# Any other answer completes the sentence "unknown flag X: it is …".
FOREIGN_FLAGS = {
    # The model and its tokenizer.
    "model_name_or_path": "--model.name",
    "model_name": "--model.name",
    "model": "--model.name",
    "checkpoint_dir": "--model.name",
    "init_from": "--model.name, or --run.resume latest to continue a run",
    "model_type": "--model.type",
    "config_name": "--model.type, and " + _CONFIG,
    "config_overrides": _CONFIG,
    "n_layer": _CONFIG,
    "n_head": _CONFIG,
    "n_embd": _CONFIG,
    "dropout": _CONFIG,
    "tokenizer_name": "--tokens.name",
    "tokenizer_name_or_path": "--tokens.name",
    "attn_implementation": "--model.attention",
    "use_lora": "--model.lora-rank",
    "use_peft": "--model.lora-rank",
    "lora_r": "--model.lora-rank",
    "lora_target_modules": "--model.lora-targets",
    # The data.
    "dataset_name": "--data.source",
    "dataset": "--data.source",
    "dataset_path": "--data.source",
    "train_file": "--data.source",
    "data": "--data.source",
    "data_dir": "--data.source",
    "dataset_config_name": "--data.config",
    "dataset_config": "--data.config",
    "task_name": "--data.source nyu-mll/glue --data.config",
    "train_split_name": "--data.split",
    "dataset_train_split": "--data.split",
    "validation_file": "--data.eval-source",
    "eval_file": "--data.eval-source",
    "dataset_test_split": "--data.eval-split",
    "validation_split_percentage": "--data.eval-fraction, a share such as 0.05",
    "val_split_fraction": "--data.eval-fraction",
    "text_column_name": "--data.column",
    "text_column_names": "--data.column and --data.pair-column",
    "dataset_text_field": "--data.column",
    "label_column_name": "--data.label-column",
    "mlm_probability": "--objective.rate",
    "line_by_line": "--batch.layout documents",
    "packing": "--batch.layout packed",
    "pad_to_max_length": "not needed: minilm pads only where it cannot pack rows, and then to the longest row",
    # The batch.
    "per_device_train_batch_size": _STEP,
    "per_gpu_train_batch_size": _STEP,
    "train_batch_size": _STEP,
    "batch_size": _STEP,
    "global_batch_size": _STEP,
    "total_batch_size": _STEP,
    "per_device_eval_batch_size": _MICRO,
    "per_gpu_eval_batch_size": _MICRO,
    "eval_batch_size": _MICRO,
    "micro_batch_size": _MICRO,
    "device_batch_size": _MICRO,
    "local_batch_size": _MICRO,
    "auto_find_batch_size": "--batch.micro-tokens auto",
    "gradient_accumulation_steps": "not needed: a step of --batch.examples is cut into passes of --batch.micro-tokens",
    "gradient_accumulation_iters": "not needed: a step of --batch.examples is cut into passes of --batch.micro-tokens",
    "rampup_batch_size": "--run.phases",
    "phase": "--run.phases",
    "max_seq_length": _LENGTH,
    "max_seq_len": _LENGTH,
    "seq_length": _LENGTH,
    "seq_len": _LENGTH,
    "sequence_length": _LENGTH,
    "sequence_len": _LENGTH,
    "block_size": _LENGTH + "; --batch.layout blocks cuts all text into full blocks",
    "group_by_length": "not needed: minilm sorts the examples of each step by length (--batch.group epoch sorts all)",
    "train_sampling_strategy": "--batch.group",
    "length_column_name": "not needed: minilm knows the lengths",
    "dataloader_num_workers": "--batch.workers",
    "num_workers": "--batch.workers",
    "preprocessing_num_workers": "not needed: the tokenizer uses all processors",
    # The optimizer.
    "optim": "--optim.name",
    "optimizer": "--optim.name",
    "learning_rate": "--optim.lr",
    "max_lr": "--optim.lr",
    "lr_scheduler_type": "--optim.schedule",
    "lr_scheduler": "--optim.schedule",
    "decay_lr": "--optim.schedule",
    "min_lr": "--optim.final-lr, as a share of --optim.lr",
    "min_lr_ratio": "--optim.final-lr",
    "min_lr_factor": "--optim.final-lr",
    "final_lr_frac": "--optim.final-lr",
    "decay_ratio": _DECAY,
    "warmdown_ratio": _DECAY,
    "num_decay_steps": _DECAY,
    "decay_type": "--optim.decay-shape",
    "lr_decay_style": "--optim.schedule",
    "warmup_steps": _WARMUP,
    "warmup_ratio": _WARMUP,
    "warmup_iters": _WARMUP,
    "lr_warmup_steps": _WARMUP,
    "lr_warmup_fraction": _WARMUP,
    "adam_beta1": "--optim.betas, both numbers",
    "adam_beta2": "--optim.betas, both numbers",
    "beta1": "--optim.betas, both numbers",
    "beta2": "--optim.betas, both numbers",
    "adam_epsilon": "--optim.eps",
    "grad_clip": "--optim.max-grad-norm",
    "max_norm": "--optim.max-grad-norm",
    "gradient_clip_val": "--optim.max-grad-norm",
    "label_smoothing_factor": "--objective.label-smoothing",
    # The run.
    "num_train_epochs": "--run.epochs",
    "max_epochs": "--run.epochs",
    "num_epochs": "--run.epochs",
    "max_train_steps": "--run.max-steps",
    "max_iters": "--run.max-steps",
    "num_iterations": "--run.max-steps",
    "lr_decay_iters": "--run.max-steps, where the schedule ends",
    "out_dir": "--run.output-dir",
    "overwrite_output_dir": "--run.overwrite",
    "resume_from_checkpoint": "--run.resume latest, or the path of a checkpoint",
    "eval_steps": _EVERY,
    "eval_interval": _EVERY,
    "eval_strategy": _EVERY + " (default: after each epoch)",
    "evaluation_strategy": _EVERY + " (default: after each epoch)",
    "save_steps": _SAVE,
    "save_interval": _SAVE,
    "save_strategy": _SAVE,
    "checkpointing_steps": _SAVE,
    "save_total_limit": "--run.keep-last",
    "load_best_model_at_end": "--run.load-best",
    "metric_for_best_model": "--run.best-metric",
    "greater_is_better": "not needed: minilm knows which figures are losses",
    "early_stopping_patience": "--run.patience",
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "logging_first_step": _LOGGED,
    "log_interval": _LOGGED,
    "logging_dir": "--run.output-dir, which holds log.jsonl",
    "run_name": "--run.output-dir",
    "report_to": "--run.trackers",
    "with_tracking": "--run.trackers",
    "wandb_log": "--run.trackers wandb",
    "fp16": "--run.precision fp16",
    "bf16": "--run.precision bf16",
    "mixed_precision": "--run.precision",
    "dtype": "--run.precision",
    "torch_dtype": "--run.precision",
    "torch_compile": "--run.compile",
    "full_determinism": "--run.deterministic",
    "ddp_timeout": "--run.timeout, in seconds",
    "hub_model_id": "--run.push-to-hub NAME",
    "do_train": "not needed: a recipe trains and evaluates",
    "do_eval": "not needed: a recipe trains and evaluates",
    "do_predict": "not needed: minilm classify DIR --file FILE predicts",
    "num_processes": _LAUNCHER,
    "nproc_per_node": _LAUNCHER,
    "devices": _LAUNCHER,
    "n_gpu": _LAUNCHER,
}


def refuse_foreign_flags(words: Sequence[str], default: Config) -> None:
    """Raise ValueError for the first unknown flag for which minilm has a replacement.

    Such a flag belongs to another program (`--learning-rate`), or lacks its group (`--lr`). The error says what to use
    in its place. The parser reports other unknown flags.

    words: the words of the command line. default: the configuration whose fields are the flags.
    """
    groups = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    own = {group: {field.name for field in dataclasses.fields(settings)} for group, settings in groups.items()}
    for word in words:
        if not word.startswith("--"):
            continue
        flag = word.split("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        group, _, last = name.rpartition(".")
        if last in own.get(group, ()) or name.startswith("model.config."):
            continue
        owners = [group for group, fields in own.items() if last in fields]
        if len(owners) == 1:
            raise ValueError(f"unknown flag {flag}: use --{owners[0]}.{last.replace('_', '-')}")
        if last in FOREIGN_FLAGS:
            answer = FOREIGN_FLAGS[last]
            verb = "use" if answer.startswith("--") else "it is"
            raise ValueError(f"unknown flag {flag}: {verb} {answer}")
