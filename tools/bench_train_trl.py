"""One run of TRL's SFTTrainer on packs that `prep convert --to hf` wrote: the peer of `tools/bench_train.py`.

    torchrun --nproc-per-node N tools/bench_train_trl.py MODEL PACKS(hf folder) STEPS LEARNING_RATE RESULT.json

Prints nothing of its own; RESULT.json gets the loss and seconds of every step, peak memory, and three losses before
training: TRL's, the one of the documents one at a time, and the one of a pack whose documents see each other.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import trl
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

IGNORED = -100


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)


def summed_loss(model, ids: list[int], labels: list[int], positions: list[int]) -> tuple[float, int]:
    """Cross-entropy in float64 (transformers' own in float32 is 5e-4 off on CPU) over the targets, and how many."""
    with torch.no_grad():
        options = {"position_ids": torch.tensor([positions]), "use_cache": False}
        logits = model(input_ids=torch.tensor([ids]), **options).logits[0, :-1].double()
    targets = torch.tensor(labels[1:])
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss.item(), int((targets != IGNORED).sum())


def losses_by_hand(model, packs: Dataset) -> tuple[float, float]:
    """(mean loss of the documents one at a time, mean loss of packs with their documents joined)."""
    alone = joined = 0.0
    targets = 0
    for pack in packs:
        at = 0
        for length in pack["seq_lengths"]:
            held = slice(at, at + length)
            loss, count = summed_loss(model, pack["input_ids"][held], pack["labels"][held], list(range(length)))
            alone, targets, at = alone + loss, targets + count, at + length
        joined += summed_loss(model, pack["input_ids"], pack["labels"], list(range(len(pack["input_ids"]))))[0]
    return alone / targets, joined / targets


def main() -> None:
    model_dir, packs_dir, steps, rate, result = sys.argv[1:]
    packs = load_from_disk(packs_dir)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.SFTConfig(
            output_dir=scratch,
            max_steps=int(steps),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=float(rate),
            lr_scheduler_type="constant",
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            padding_free=True,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa", use_cache=False
        )
        trainer = trl.SFTTrainer(
            model,
            args=config,
            train_dataset=packs,
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            callbacks=[times],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    worst = torch.tensor([float(peak)])
    rank = 0
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        rank = dist.get_rank()
    if rank == 0:
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        fresh = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
        alone, joined = losses_by_hand(fresh, packs)
        value = {"losses": logged, "seconds": times.seconds, "memory_bytes": int(worst.item())}
        Path(result).write_text(json.dumps({**value, "loss_alone": alone, "loss_joined": joined}), encoding="utf-8")


if __name__ == "__main__":
    main()
