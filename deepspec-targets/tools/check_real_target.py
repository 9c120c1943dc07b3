"""Checks a real target against transformers itself: features, greedy decoding, tokens per second.

    python tools/check_real_target.py TARGET_DIR PROMPTS.jsonl [--prompts 5] [--new-tokens 32]

TARGET_DIR is a Hugging Face directory of any family that is installed, PROMPTS a JSON-lines file with `turns` or
`messages`; the first user message of a line is one prompt. For each of --dtypes (float32,bfloat16), on the device that
is there:

- features of all prompts in one padded batch against `output_hidden_states` of each prompt alone;
- greedy decoding, all prompts at once and one at a time, against transformers' `generate`. Float32 must agree token for
  token, or the script fails; in other dtypes the two round differently, so where they part, the gap between the two
  likeliest logits is told, and beside it how far the logits of both differ on the same text;
- tokens per second of all three.

Prints Markdown. T tokens, V vocabulary. Takes about five minutes for a 0.5B target on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.targets.opening import load_target, open_adapter, tokenizer_for

Result = TypeVar("Result")
FEATURE_TOLERANCE = 1e-4  # of the largest value, in float32


def prompts_of(path: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of the first prompts, ready for the assistant to speak."""
    prompts = []
    for line in path.read_text("utf-8").splitlines()[:count]:
        row = json.loads(line)
        text = row["turns"][0] if "turns" in row else row["messages"][0]["content"]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return prompts


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """What `run` returns, and the seconds it took."""
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


@torch.no_grad()
def feature_difference(target: Any, prompts: list[list[int]]) -> float:
    """The largest difference of taps and last hidden states, relative to the largest value of each prompt."""
    layers = target.architecture.num_layers
    taps = (-1, *sorted({1, layers // 4, layers // 2, 3 * layers // 4, layers - 3}))
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=target.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=target.device)
    features = target.features(ids, mask, None, None, taps)
    target.features(ids[:, :1], mask[:, :1], None, None, ())  # takes the hooks off again
    worst = 0.0
    for row, prompt in enumerate(prompts):
        states = target.decoder(ids[row : row + 1, : len(prompt)], output_hidden_states=True).hidden_states
        expected = [torch.cat([states[tap + 1] for tap in taps], dim=-1)[0], states[-1][0]]
        for found, right in zip((features.hidden, features.last_hidden), expected, strict=True):
            difference = (found[row, : len(prompt)] - right).abs().max() / right.abs().max()
            worst = max(worst, float(difference))
    return worst


def ours(target: Any, prompts: list[list[int]], new_tokens: int, batch_size: int) -> list[list[int]]:
    """Greedy continuations by the engine, without a draft."""
    completions = decode(
        target,
        None,
        [Request(id=str(i), prompt_ids=tuple(prompt), seed=i) for i, prompt in enumerate(prompts)],
        sampling=Sampling(temperature=0.0),
        stop_ids=target.architecture.stop_token_ids,
        max_new_tokens=new_tokens,
        batch_size=batch_size,
        max_length=max(map(len, prompts)) + new_tokens + 1,
    )
    found = {int(completion.id): list(completion.output_ids) for completion in completions}
    return [found[index] for index in range(len(prompts))]


@torch.no_grad()
def theirs(target: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations by transformers' generate, one prompt at a time."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=target.device)
        output = target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=new_tokens,
            eos_token_id=list(target.architecture.stop_token_ids),
            pad_token_id=target.architecture.pad_token_id,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


@torch.no_grad()
def logits_of(target: Any, prompt: list[int], output: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the output's tokens given the tokens before them: the model's own forward, and our decode."""
    text = torch.tensor([prompt + output], device=target.device)
    reference = target.model(text[:, :-1]).logits[0, len(prompt) - 1 :]
    target.open_slots(1, text.shape[1])
    slot = torch.zeros(1, dtype=torch.long, device=target.device)
    positions = torch.arange(text.shape[1], device=target.device)[None]
    start = len(prompt) - 1
    target.decode(slot, text[:, :start], positions[:, :start], ())
    target.commit(slot, torch.tensor([start], device=target.device))
    found = target.decode(slot, text[:, start:-1], positions[:, start:-1], ()).logits[0]
    return reference.float(), found.float()


def told(target: Any, prompt: list[int], right: list[int], ways: dict[str, list[int]]) -> str:
    """One prompt: how far logits differ, and for each way the same, or where they part and how close the choice was."""
    logits_TV, again_TV = logits_of(target, prompt, right)
    gaps_T = logits_TV.topk(2).values.diff().abs().squeeze(-1)
    parts = [f"{len(prompt)} tokens and {len(right)} new; logits differ by {(logits_TV - again_TV).abs().max():.1e}"]
    parts.append(f"the closest choice is between logits {gaps_T.min():.4f} apart")
    for way, output in ways.items():
        apart = next((at for at, pair in enumerate(zip(right, output, strict=False)) if pair[0] != pair[1]), None)
        if apart is None:
            parts.append(f"{way} {'the same' if right == output else f'stops after {len(output)}'}")
        else:
            parts.append(f"{way} parts at token {apart}, where the two likeliest are {gaps_T[apart]:.4f} apart")
    return "; ".join(parts)


def main() -> int:
    """Run the checks; 1 where float32 does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("prompts_file", type=Path)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapter = open_adapter(options.target, registry=load_plugins().registry)
    prompts = prompts_of(options.prompts_file, tokenizer_for(options.target), options.prompts)
    wrong = False
    print(f"{adapter.architecture.model_type} on {device}, {torch.get_num_threads()} threads, {len(prompts)} prompts")
    for name in options.dtypes.split(","):
        target: Any = load_target(adapter, options.target, dtype=getattr(torch, name), device=device)
        difference = feature_difference(target, prompts)
        together, together_s = timed(lambda t=target: ours(t, prompts, options.new_tokens, len(prompts)))
        alone, alone_s = timed(lambda t=target: ours(t, prompts, options.new_tokens, 1))
        reference, reference_s = timed(lambda t=target: theirs(t, prompts, options.new_tokens))
        print(f"\n{name}: features differ by {difference:.1e} of the largest value")
        for index, (prompt, right) in enumerate(zip(prompts, reference, strict=True)):
            ways = {"all at once": together[index], "one at a time": alone[index]}
            print(f"- prompt {index}: {told(target, prompt, right, ways)}", flush=True)
        for way, output, seconds in (
            ("all at once", together, together_s),
            ("one at a time", alone, alone_s),
            ("transformers' generate, one at a time", reference, reference_s),
        ):
            print(f"- {way}: {sum(map(len, output)) / seconds:.2f} tokens/s, prompts included")
        if name == "float32":
            wrong |= difference > FEATURE_TOLERANCE or together != reference or alone != reference
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
