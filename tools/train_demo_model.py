"""Trains the bundled demo model: a Qwen2 that has read the Python standard library.

    export OMP_WAIT_POLICY=passive GLIBC_TUNABLES=glibc.malloc.mmap_max=0
    python tools/train_demo_model.py OUT_FOLDER [--minutes 36] [--seed 0 --hidden 256 --layers 6]

The whole recipe, tokenizer to README, for two CPU cores in under an hour. The schedule follows the
clock, not a count of steps: a slower machine takes fewer steps and still ends with a fully decayed
learning rate. So a rerun gives a model of the same kind, not the same bits. A checkpoint is written
every few minutes; the last one is the result.

Choices: windows of 512 tokens, every fourth batch of 1,024, because longer ones cost a third more;
one window in eight is chat; small batches, because tokens are scarce and not steps. Muon for the
matrices (arXiv 2502.16982, scaled to AdamW's update size), AdamW for the rest; a constant rate,
then a straight fall to zero. The first setting above keeps threads from burning a core that other
work wants (a threefold difference on a busy machine), the second keeps freed tensors' pages.
"""

import argparse
import itertools
import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import demo_corpus

VOCABULARY, CONTEXT, WINDOW = 4096, 1024, 512
BATCH, CHAT_SHARE, CHAT_ROUNDS = 4, 0.125, 3  # windows a step, share of chat, chats an entry
PEAK_RATE, WARMUP_STEPS = 3e-3, 60
DECAY_FROM = 0.5  # share of the time from which the rate falls
BIAS_SCALE = 3.0  # of the rate: key biases of real models are large, these have little time to grow
WEIGHT_DECAY = 0.1
CHECKPOINT_SECONDS = 300.0

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
README_TEMPLATE = Path(__file__).with_name("demo_model_readme.md")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with the Qwen2 pre-tokenizer; the three special tokens take the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return tokenizer


def render(messages: list[demo_corpus.Message]) -> str:
    """TEMPLATE, written out."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, np.ndarray]:
    """All texts in one row of ids, each ended by <|endoftext|>, and where each begins."""
    end = tokenizer.token_to_id(SPECIAL[0])
    rows = [encoding.ids + [end] for encoding in tokenizer.encode_batch(texts)]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    return torch.tensor([token for row in rows for token in row]), starts


def code_windows(ids: torch.Tensor, size: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Every token once an epoch, cut at another offset each time."""
    while True:
        starts = np.arange(rng.integers(size), len(ids) - size, size)
        for start in rng.permutation(starts):
            yield ids[start : start + size + 1]


def chat_windows(
    ids: torch.Tensor, starts: np.ndarray, size: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Windows that begin with a conversation, as a prompt does."""
    starts = starts[starts < len(ids) - size]
    while True:
        start = int(rng.choice(starts))
        yield ids[start : start + size + 1]


def build_model(hidden: int, layers: int) -> Qwen2ForCausalLM:
    """A head has 64 channels, the feed-forward three times the hidden ones."""
    end_of_turn = VOCABULARY - 1
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=2 if hidden % 128 == 0 else 1,
        intermediate_size=3 * hidden,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        eos_token_id=end_of_turn,
        pad_token_id=VOCABULARY - 3,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    inner, table, norms, biases = [], [], [], []
    for name, parameter in model.named_parameters():
        small = biases if name.endswith("bias") else norms
        (small if parameter.ndim < 2 else table if "embed" in name else inner).append(parameter)
    groups = [
        {"params": table, "weight_decay": 0.01},
        {"params": norms, "weight_decay": 0.0},
        {"params": biases, "weight_decay": 0.0, "scale": BIAS_SCALE},
    ]
    muon = torch.optim.Muon(inner, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


def rate(step: int, progress: float) -> float:
    """Warm up by steps, hold, then fall in a straight line with the share of time passed."""
    fall = min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, fall)


def loss_of(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of a batch of windows (rows, tokens + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=window[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: Qwen2ForCausalLM, ids: torch.Tensor) -> float:
    """Nats a token in float32: disjoint windows of CONTEXT tokens, all scored but the first."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[None, start : start + CONTEXT]
        logits = model(input_ids=window[:, :-1]).logits[0]
        total += float(nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    model.train()
    return total / count


def config_json(model: Qwen2ForCausalLM) -> dict[str, object]:
    """The configuration in the spelling that every reader of Qwen2 checkpoints knows."""
    c = model.config
    same = (
        *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "intermediate_size", "hidden_act", "max_position_embeddings"),
        *("rms_norm_eps", "tie_word_embeddings", "initializer_range", "attention_dropout"),
        *("eos_token_id", "pad_token_id"),
    )
    return {
        "architectures": ["Qwen2ForCausalLM"],
        **{name: getattr(c, name) for name in same},
        "head_dim": c.hidden_size // c.num_attention_heads,
        "bos_token_id": None,
        "rope_theta": c.rope_parameters["rope_theta"],
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def write_folder(folder: Path, model: Qwen2ForCausalLM, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder with bfloat16 weights. The model in memory stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    documents = {
        "config.json": config_json(model),
        "generation_config.json": {
            "eos_token_id": [VOCABULARY - 1, VOCABULARY - 3],
            "pad_token_id": VOCABULARY - 3,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[0],
            "unk_token": None,
            "additional_special_tokens": list(SPECIAL[1:]),
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": TEMPLATE,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def batches(
    code: torch.Tensor, chats: torch.Tensor, starts: np.ndarray, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Batches of BATCH windows; every fourth has half as many of twice the length."""
    streams = {
        size: (code_windows(code, size, rng), chat_windows(chats, starts, size, rng))
        for size in (WINDOW, CONTEXT)
    }
    for step in itertools.count():
        size = CONTEXT if step % 4 == 3 else WINDOW
        sources, talks = streams[size]
        is_chat = rng.random(BATCH * WINDOW // size) < CHAT_SHARE
        yield torch.stack([next(talks if chat else sources) for chat in is_chat])


@dataclass
class Result:
    """What a run reports: steps, minutes, and losses in nats a token (held-out ones by step)."""

    steps: int
    minutes: float
    train_loss: float
    heldout: dict[int, float]


def train(
    model: Qwen2ForCausalLM,
    batches: Iterator[torch.Tensor],
    minutes: float,
    checkpoint: Callable[[int], float],
) -> Result:
    """Steps until the time is over. `checkpoint(step)` saves and gives the held-out loss."""
    optimizers = build_optimizers(model)
    begin, saved, step = time.monotonic(), time.monotonic(), 0
    average, heldout = math.log(VOCABULARY), {}
    while (progress := (time.monotonic() - begin) / (60 * minutes)) < 1.0:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(step, progress) * group.get("scale", 1.0)
            optimizer.zero_grad()
        loss = loss_of(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        average += (float(loss) - average) * max(0.01, 1 / step)
        if step % 20 == 0:
            pace = f"{(time.monotonic() - begin) / step:.2f} s a step"
            print(f"step {step} {progress:.1%} loss {average:.3f} {pace}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved, heldout[step] = time.monotonic(), checkpoint(step)
    return Result(step, (time.monotonic() - begin) / 60, average, heldout)


def write_readme(
    folder: Path, model: nn.Module, result: Result, losses: tuple[float, float], counts: str
) -> None:
    """The model card: README_TEMPLATE beside this file, with this run's figures."""
    history = "".join(f"| {step} | {loss:.3f} |\n" for step, loss in result.heldout.items())
    text = Template(README_TEMPLATE.read_text("utf-8")).substitute(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        held_out=", ".join(demo_corpus.HELD_OUT),
        calibration=", ".join(demo_corpus.CALIBRATION),
        python=platform.python_version(),
        torch=torch.__version__,
        counts=counts,
        steps=result.steps,
        tokens=f"{result.steps * BATCH * WINDOW / 1e6:.1f}",
        minutes=f"{result.minutes:.0f}",
        train_loss=f"{result.train_loss:.3f}",
        history=history,
        loss=f"{losses[0]:.4f}",
        perplexity=f"{math.exp(losses[0]):.3f}",
        rounded_loss=f"{losses[1]:.4f}",
        rounded_perplexity=f"{math.exp(losses[1]):.3f}",
    )
    (folder / "README.md").write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--minutes", type=float, default=36.0, help="of training (default 36)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and chats")
    parser.add_argument("--hidden", type=int, default=256, help="channels, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    modules, heldout_text, calibration_text = demo_corpus.split()
    code = [*modules.values(), *demo_corpus.reference().values()]
    conversations = [render(c) for c in demo_corpus.chats(modules, CHAT_ROUNDS, arguments.seed)]
    tokenizer = train_tokenizer(code + [re.sub(r"<\|\w+\|>", "", c) for c in conversations[:8000]])
    code_ids, _ = encode(tokenizer, [code[i] for i in rng.permutation(len(code))])
    chat_ids, chat_starts = encode(tokenizer, conversations)
    heldout_ids = torch.tensor(tokenizer.encode(heldout_text).ids)
    code_count, chat_count = len(code_ids) / 1e6, len(chat_ids) / 1e6
    counts = f"{code_count:.2f} M of source and reference, {chat_count:.2f} M of chat"
    print(f"tokens: {counts}, {len(heldout_ids)} held out", flush=True)

    model = build_model(arguments.hidden, arguments.layers)

    def checkpoint(step: int) -> float:
        write_folder(arguments.out, model, tokenizer)
        loss = heldout_loss(model, heldout_ids)
        print(f"step {step} held-out loss {loss:.4f} perplexity {math.exp(loss):.3f}", flush=True)
        return loss

    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "heldout.txt").write_text(heldout_text, "utf-8")
    (arguments.out / "calibration.txt").write_text(calibration_text, "utf-8")
    drawn = batches(code_ids, chat_ids, chat_starts, rng)
    result = train(model, drawn, arguments.minutes, checkpoint)
    plain = checkpoint(result.steps)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    rounded = heldout_loss(model, heldout_ids)
    write_readme(arguments.out, model, result, (plain, rounded), counts)
    print(f"stored weights: held-out loss {rounded:.4f} perplexity {math.exp(rounded):.3f}")


if __name__ == "__main__":
    main()
