"""Pretrain the small Qwen3 from scratch: Muon for the matrices, AdamW for the rest, bf16 autocast where that is fast.

The schedule is set for a fixed number of tokens. A checkpoint (weights, optimisers, random state, data position) is
written every few minutes and picked up again when the script is restarted with the same arguments; Ctrl-C or a kill
loses at most that much. A GPU is used when there is one. Each checkpoint also holds the averaged weights (exponential,
half-life about 2 % of the run), which are the ones that are exported.

    python pretrain.py --tokens 13000000 --threads 1
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import POOLS, WORK
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM


def build(tokenizer) -> Qwen3ForCausalLM:
    """Build the model, randomly initialised; the architecture is Qwen3's own with tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        intermediate_size=640,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps in fp32, matrices of one shape together (Jordan, 2024).

    `torch.optim.Muon` orthogonalises in bf16, which some CPUs do very slowly, and one matrix at a time.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])
                by_shape.setdefault(tuple(sorted(update.shape)), []).append((weight, update))
            for pairs in by_shape.values():
                wide = torch.stack([update if update.shape[0] <= update.shape[1] else update.T for _, update in pairs])
                wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = wide @ wide.mT
                    wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
                for (weight, update), direction in zip(pairs, wide, strict=True):
                    direction = direction if update.shape[0] <= update.shape[1] else direction.T
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction, alpha=-group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


class Batches:
    """Windows of `length` + 1 tokens, pools drawn by their share, each pool without replacement; resumable."""

    def __init__(self, folder: Path, length: int, size: int) -> None:
        self.tokens = {pool: torch.from_numpy(np.load(folder / f"train_{pool}.npy")).long() for pool in POOLS}
        self.length, self.size = length, size
        self.generator = torch.Generator().manual_seed(1)
        self.starts: dict[str, list[int]] = {pool: [] for pool in POOLS}

    def window(self, pool: str) -> torch.Tensor:
        """Take the next window of a pool, [length + 1]; a used-up pool starts again, shuffled and shifted."""
        if not self.starts[pool]:
            offset = int(torch.randint(0, self.length, (1,), generator=self.generator))
            count = (len(self.tokens[pool]) - offset - 1) // self.length
            self.starts[pool] = (torch.randperm(count, generator=self.generator) * self.length + offset).tolist()
        start = self.starts[pool].pop()
        return self.tokens[pool][start : start + self.length + 1]

    def next(self) -> torch.Tensor:
        """Draw the next batch, [size, length + 1] token ids."""
        shares = torch.tensor(list(POOLS.values()))
        drawn = torch.multinomial(shares, self.size, replacement=True, generator=self.generator)
        return torch.stack([self.window(list(POOLS)[index]) for index in drawn.tolist()])

    def state_dict(self) -> dict:
        """Return what a resumed run needs."""
        return {"generator": self.generator.get_state(), "starts": self.starts}

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state."""
        self.generator.set_state(state["generator"])
        self.starts = state["starts"]


def learning_rate(done: float) -> float:
    """Share of the peak rate after `done` of the tokens: short warm-up, flat, linear to 2 % over the second half."""
    return min(1.0, (done + 1e-4) / 0.01) * (1.0 if done < 0.5 else max(0.02, 2 * (1 - done)))


def next_token_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Mean cross-entropy in nats a token of `ids` [batch, length + 1]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def dev_losses(
    model: Qwen3ForCausalLM, folder: Path, length: int, device: torch.device, autocast: bool, windows: int = 32
) -> dict[str, float]:
    """Nats a token on the first windows of every pool's development pages."""
    losses = {}
    for pool in POOLS:
        tokens = torch.from_numpy(np.load(folder / f"dev_{pool}.npy")).long()[: windows * length + 1]
        ids = torch.stack([tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)])
        parts = [next_token_loss(model, part.to(device), autocast).item() * len(part) for part in ids.split(8)]
        losses[pool] = round(sum(parts) / len(ids), 4)
    return losses


def bf16_is_fast() -> bool:
    """Time a small matrix product in fp32 and bf16 on this CPU."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.randn(1024, 192, dtype=dtype), torch.randn(192, 640, dtype=dtype)
        left @ right
        start = time.perf_counter()
        for _ in range(20):
            left @ right
        return time.perf_counter() - start

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for all working data")
    parser.add_argument("--tokens", type=float, default=13e6, help="tokens to train on; sets the schedule")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--batch", type=int, default=16, help="windows of a batch")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak learning rate of the matrices")
    parser.add_argument("--adam-lr", type=float, default=2e-3, help="peak learning rate of embeddings and norms")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--stop-after", type=int, help="stop after so many steps (for timing)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = device.type == "cuda" or bf16_is_fast()
    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "tokenizer")
    model = build(tokenizer).to(device)
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if not (weight.ndim == 2 and "embed" not in name)]
    optimizers = [
        Muon(matrices, lr=arguments.muon_lr),
        torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    peaks = [arguments.muon_lr, arguments.adam_lr]
    batches = Batches(arguments.work / "tokens", arguments.length, arguments.batch)
    tokens_a_step = arguments.length * arguments.batch
    steps = int(arguments.tokens / tokens_a_step)
    step, seconds = 0, 0.0

    folder = arguments.work / "pretrain"
    folder.mkdir(exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average, step, seconds = state["average"], state["step"], state["seconds"]
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        batches.load_state_dict({**state["batches"], "generator": state["batches"]["generator"].cpu()})
        torch.set_rng_state(state["random"].cpu())
        print(f"resumed at step {step}", flush=True)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "batches": batches.state_dict(),
            "random": torch.get_rng_state(),
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        os.replace(checkpoint.with_suffix(".partial"), checkpoint)  # a killed run never leaves half a file

    compute = torch.compile(next_token_loss) if arguments.compile else next_token_loss
    decay = 0.5 ** (1 / max(1, 0.02 * steps))
    smooth, last_save, started = None, time.perf_counter(), time.perf_counter()
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {steps} steps on {device}, bf16 autocast {autocast}", flush=True)
    while step < steps:
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(step / steps)
        loss = compute(model, batches.next().to(device), autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        rate = min(decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - rate)
        step += 1
        seconds, started = seconds + time.perf_counter() - started, time.perf_counter()
        if step % 25 == 0 or step == steps:
            smooth = loss.item() if smooth is None else 0.8 * smooth + 0.2 * loss.item()
            record = {
                "step": step,
                "seconds": round(seconds, 1),
                "tokens": step * tokens_a_step,
                "loss": round(smooth, 4),
            }
            if step % 500 == 0 or step == steps:
                record["dev"] = dev_losses(model, arguments.work / "tokens", arguments.length, device, autocast)
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
        if time.perf_counter() - last_save > 60 * arguments.checkpoint_minutes or step == steps:
            save()
            last_save = time.perf_counter()
        if arguments.stop_after and step >= arguments.stop_after:
            return
    report = {
        "parameters": parameters,
        "tokens": step * tokens_a_step,
        "minutes": round(seconds / 60, 1),
        "device": str(device),
        "threads": arguments.threads,
        "bf16_autocast": autocast,
        "dev_nats_a_token": {
            "last_weights": dev_losses(model, arguments.work / "tokens", arguments.length, device, autocast),
        },
    }
    model.load_state_dict(average, strict=False)
    report["dev_nats_a_token"]["averaged_weights"] = dev_losses(
        model, arguments.work / "tokens", arguments.length, device, autocast
    )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "pretrain.json").write_text(json.dumps(report, indent=1) + "\n")
    print(report, flush=True)


if __name__ == "__main__":
    main()
