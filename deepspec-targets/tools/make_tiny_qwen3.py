"""Make the built-in tiny target: train a tokenizer and a small Qwen3 on our own dialogues, and measure it.

    python make_tiny_qwen3.py OUT_DIR [--minutes 15] [--threads 2] [--seed 0] [--start FOLDER]

OUT_DIR receives a Hugging Face model folder (config, weights in bfloat16, tokenizer with chat template) and
training.json with what was done and how good the saved model is on held-out prompts. The schedule runs by the clock,
so the same command makes a better model on a faster machine; --steps fixes the number of steps instead, which
together with the seed makes a run repeatable. The folder is also written every few minutes, so an interrupted run
leaves a usable, if unfinished, model; --start goes on from such a folder's weights and tokenizer, with a schedule and
a seed (so other dialogues) of its own.

This file knows the shape of the tiny target and how it is trained. It knows nothing of DeepSpec's core, and what the
dialogues say is the business of deepspec_targets.dialogues.
"""

import argparse
import itertools
import json
import math
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# The script runs from a checkout, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from deepspec_targets.dialogues import check, dialogues, prompts, words

END, START, STOP, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
SPECIALS: Final = [END, START, STOP, MASK, *(f"<|reserved_{n}|>" for n in range(4))]
VOCABULARY: Final = 1024
MAX_POSITIONS: Final = 1024
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Words take the space before them, marks the spaces around them, and every digit stands alone: arithmetic is learned
# digit by digit, and "= " as one token spares a token per number.
SPLIT_PATTERN: Final = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+ ?|\n+ *|\s+"

LEARNING_RATE: Final = 3e-3
MUON_LEARNING_RATE: Final = 1.5e-2
WARMUP, DECAY, RESTART = 0.02, 0.45, 0.6
# Small talk can be said in many ways, and that is most of the loss; digits, and the names and things that an answer
# takes over from the prompt, are what can be right or wrong. They are seldom in competition with other words.
FACT_WEIGHT: Final = 3.0
FACTS: Final = (*words.NAMES, *words.CITIES, *words.THINGS, *words.COLOURS, *words.HOBBIES, *words.JOBS, *words.FOODS)
IGNORED: Final = -100


def train_tokenizer(dialogue_count: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chosen = itertools.islice(dialogues("train", seed=seed), dialogue_count)
    texts = (f"{m['role']}\n{m['content']}" for dialogue in chosen for m in dialogue["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=END,
        mask_token=MASK,
        additional_special_tokens=[START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model: deep and thin, because a draft saves layers and every layer costs time, however narrow."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # Each layer adds to the residual stream; the sum over all layers should keep its size.
                weight.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def encode(tokenizer: Tokenizer, dialogue: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of a dialogue, and the same with everything the assistant did not say left out of the loss."""
    start, stop = tokenizer.token_to_id(START), tokenizer.token_to_id(STOP)
    ids: list[int] = []
    labels: list[int] = []
    for message in dialogue["messages"]:
        head = [start, *tokenizer.encode(f"{message['role']}\n").ids]
        body = [*tokenizer.encode(message["content"]).ids, stop]
        tail = tokenizer.encode("\n").ids
        ids += head + body + tail
        spoken = message["role"] == "assistant"
        labels += [IGNORED] * len(head) + (body if spoken else [IGNORED] * len(body)) + [IGNORED] * len(tail)
    return ids, labels


def fact_tokens(tokenizer: Tokenizer) -> Tensor:
    """The tokens that spell digits and the facts of a prompt."""
    texts = [*"0123456789", *FACTS, *(f" {fact}" for fact in FACTS)]
    blank = set(tokenizer.encode(" ").ids)
    return torch.tensor(sorted({token for text in texts for token in tokenizer.encode(text).ids} - blank))


def padded(sample: tuple[list[int], list[int]]) -> int:
    """The width of a row that holds a dialogue; few different widths, because shapes cost memory and compilations."""
    return math.ceil(len(sample[0]) / 16) * 16


def batches(tokenizer: Tokenizer, seed: int, tokens_a_batch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Batches of dialogues of like length, padded on the right, which causal attention never sees.

    Dialogues are collected in pools and sorted by length within a pool; the batches of a pool come in random order.
    Every pass over the stream is dealt with another seed, so prompts hardly ever repeat.
    """
    generator = torch.Generator().manual_seed(seed)
    pad = tokenizer.token_to_id(END)
    for deal in itertools.count(seed):
        stream = itertools.islice(dialogues("train", seed=deal), 200_000)
        while pool := [encode(tokenizer, dialogue) for dialogue in itertools.islice(stream, 2_000)]:
            pool.sort(key=lambda sample: len(sample[0]), reverse=True)
            groups: list[list[tuple[list[int], list[int]]]] = [[]]
            for sample in pool:
                # A batch is never larger than asked for, padding counted: compiled layers are special-cased by size.
                if groups[-1] and (len(groups[-1]) + 1) * padded(groups[-1][0]) > tokens_a_batch:
                    groups.append([])
                groups[-1].append(sample)
            for index in torch.randperm(len(groups), generator=generator).tolist():
                group, width = groups[index], padded(groups[index][0])
                if len(group) < 2:
                    continue
                input_ids = torch.full((len(group), width), pad)
                labels = torch.full((len(group), width), IGNORED)
                for row, (ids, wanted) in enumerate(group):
                    input_ids[row, : len(ids)] = torch.tensor(ids)
                    labels[row, : len(ids)] = torch.tensor(wanted)
                yield input_ids, labels, sum(len(ids) for ids, _ in group)


def answer_losses(model: Qwen3ForCausalLM, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every token the assistant says, and those tokens; logits are formed only there."""
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    spoken = wanted != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[spoken]).float(), wanted[spoken], reduction="none"), wanted[
        spoken
    ]


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, where it needs far fewer steps, AdamW for the rest."""
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=MUON_LEARNING_RATE, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def compile_layers(model: Qwen3ForCausalLM, wanted: bool) -> bool:
    """Compile the layers if this machine can; on two cores that is worth 40% more tokens a second."""
    if not wanted:
        return False
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    sample = torch.zeros((8, 48), dtype=torch.long)
    try:
        answer_losses(model, sample, sample)[0].mean().backward()
    except Exception as error:
        # No C++ compiler, mostly. Whatever it is, training goes on without.
        print(f"not compiled ({type(error).__name__}): training the slower way", flush=True)
        for layer in model.model.layers:
            layer._compiled_call_impl = None
    model.zero_grad(set_to_none=True)
    return model.model.layers[0]._compiled_call_impl is not None


def schedule(progress: float, trained: bool) -> float:
    """The factor on the learning rates: warm up, stay and decay; a model that is trained already only cools down."""
    if trained:
        return RESTART * (1 - progress)
    return min(1.0, (progress + 1e-3) / WARMUP, max(0.0, (1 - progress) / DECAY))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> Qwen3ForCausalLM:
    """Write the model folder with weights rounded to bfloat16, and return the model as it was written."""
    rounded = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.config.dtype = torch.bfloat16
    rounded.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=256,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    rounded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return rounded


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, out: Path
) -> dict[str, Any]:
    """Train by the clock or by steps, and report what was done."""
    compiled = compile_layers(model, args.compile)
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started = saved = time.monotonic()
    budget, steps, tokens = args.minutes * 60, 0, 0
    recent: list[float] = []
    facts = fact_tokens(tokenizer.backend_tokenizer)
    model.train()
    for input_ids, labels, size in batches(tokenizer.backend_tokenizer, args.seed, args.batch_tokens):
        elapsed = time.monotonic() - started
        progress = steps / args.steps if args.steps else elapsed / budget
        if progress >= 1:
            break
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(progress, args.start is not None)
        losses, wanted = answer_losses(model, input_ids, labels)
        weights = 1 + (FACT_WEIGHT - 1) * torch.isin(wanted, facts)
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps, tokens = steps + 1, tokens + size
        recent.append(losses.mean().item())
        if steps % 50 == 0:
            elapsed = time.monotonic() - started
            left = elapsed * (args.steps / steps - 1) if args.steps else budget - elapsed
            print(
                f"step {steps:5d}  loss {sum(recent) / len(recent):.4f}  {tokens / 1e6:.2f} M tokens  "
                f"{tokens / elapsed:,.0f} tokens/s  {left / 60:.1f} min left",
                flush=True,
            )
            recent.clear()
        if time.monotonic() - saved > args.save_every * 60:
            save(model, tokenizer, out)
            saved = time.monotonic()
    return {"steps": steps, "tokens": tokens, "seconds": round(time.monotonic() - started, 1), "compiled": compiled}


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, tokenizer: Tokenizer, count: int) -> float:
    """Mean cross-entropy per answer token over held-out dialogues."""
    total, spoken = 0.0, 0
    for dialogue in itertools.islice(dialogues("held_out", seed=1), count):
        ids, labels = encode(tokenizer, dialogue)
        losses, _ = answer_losses(model, torch.tensor([ids]), torch.tensor([labels]))
        total += losses.sum().item()
        spoken += losses.numel()
    return total / spoken


@torch.no_grad()
def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, *, do_sample: bool = False
) -> dict[str, Any]:
    """Answer held-out prompts and count right results, finished answers and lengths by kind."""
    model.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    ended: dict[str, list[bool]] = defaultdict(list)
    lengths: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    wrong: list[list[str]] = []
    chosen = list(itertools.islice(prompts("held_out", seed=1), count))
    tokenizer.padding_side = "left"
    for first in range(0, count, 50):
        batch = chosen[first : first + 50]
        texts = [
            tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
            for item in batch
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(**inputs, do_sample=do_sample, max_new_tokens=200)[:, inputs["input_ids"].shape[1] :]
        for item, ids in zip(batch, output.tolist(), strict=True):
            kind, prompt = item["kind"], item["messages"][0]["content"]
            ended[kind].append(tokenizer.eos_token_id in ids)
            ids = ids[: ids.index(tokenizer.eos_token_id)] if ended[kind][-1] else ids
            lengths[kind] += len(ids) + 1
            answer = tokenizer.decode(ids)
            if (verdict := check(prompt, answer)) is not None:
                right[kind].append(verdict)
                if not verdict:
                    wrong.append([prompt, answer])
            examples[kind].append(f"{prompt}\n---\n{answer}")
    checked = [verdict for verdicts in right.values() for verdict in verdicts]
    return {
        "prompts": count,
        "accuracy": round(sum(checked) / len(checked), 4),
        "accuracy_by_kind": {kind: round(sum(v) / len(v), 4) for kind, v in sorted(right.items())},
        "checked_by_kind": {kind: len(v) for kind, v in sorted(right.items())},
        "ended": round(sum(map(sum, ended.values())) / count, 4),
        "tokens_an_answer": {kind: round(lengths[kind] / len(v), 1) for kind, v in sorted(ended.items())},
        "examples": {kind: answers[:2] for kind, answers in sorted(examples.items())},
        "wrong": wrong[:10],
    }


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description="Train DeepSpec's built-in tiny target and measure it.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--minutes", type=float, default=15.0, help="time for training (default: 15)")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="go on from this finished or unfinished model")
    parser.add_argument("--batch-tokens", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=2, help="1 is faster where cores are shared (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=4.0, metavar="MINUTES")
    parser.add_argument("--evaluate", type=int, default=600, metavar="PROMPTS")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
        log = args.start / "training.json"
        earlier = json.loads(log.read_text())["training"] if log.exists() else []
    else:
        tokenizer = train_tokenizer(30_000, args.seed)
        model = make_model(tokenizer)
        earlier = []
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    done = train(model, tokenizer, args, args.out)
    settings = {name: getattr(args, name) for name in ("minutes", "seed", "batch_tokens", "threads")}
    rounded = save(model, tokenizer, args.out).float()
    report = {
        "parameters": parameters,
        "training": [*earlier, done | settings],
        "held_out_loss": round(held_out_loss(rounded, tokenizer.backend_tokenizer, 1000), 4),
        "greedy": evaluate(rounded, tokenizer, args.evaluate),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name] for name in ("parameters", "training", "held_out_loss")}, indent=2))
    print(json.dumps({k: v for k, v in report["greedy"].items() if k not in ("examples", "wrong")}, indent=2))


if __name__ == "__main__":
    main()
