"""The built-in tiny target as shipped: its size, its tokenizer, and that it answers right and stops."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deepspec_targets.dialogues as generator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FOLDER = Path(generator.__file__).parents[1] / "builtin" / "tiny-qwen3"
MOST_PARAMETERS = 3_000_000
MOST_BYTES = 8_000_000
STOP, END, START, MASK = "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|mask|>"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and on shared cores they wait for each other ten times over."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(model: Any, tokenizer: Any) -> list[tuple[dict[str, Any], list[int]]]:
    """Greedy answers to held-out prompts of all kinds, up to and without the end marker (kept if it is missing)."""
    items = list(itertools.islice(generator.prompts("held_out", seed=11), 100))
    texts = [
        tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True) for item in items
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=200)
    return list(zip(items, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True))


def test_it_is_small(model: Any) -> None:
    assert sum(weight.numel() for weight in model.parameters()) <= MOST_PARAMETERS
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= MOST_BYTES


def test_it_is_a_plain_qwen3(model: Any) -> None:
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 1024
    stored = transformers.AutoConfig.from_pretrained(FOLDER)
    assert stored.dtype == torch.bfloat16


def test_special_tokens_and_stop_ids_agree(model: Any, tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token) == (STOP, END, MASK)
    assert len(tokenizer) == model.config.vocab_size == 1024
    stops = [tokenizer.convert_tokens_to_ids(STOP), tokenizer.convert_tokens_to_ids(END)]
    assert model.generation_config.eos_token_id == stops
    assert tokenizer.encode(f"{START}user\n")[0] == tokenizer.convert_tokens_to_ids(START)


@pytest.mark.parametrize(
    "text", ["347 + 586 = 933.", "def f(x):\n    return x\n", "| a | b |", "Zürich, 東京!", "  two"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stand_alone(tokenizer: Any) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("1234 + 56"))
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("123456")


def test_the_chat_template_is_plain_chatml(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    asked = "<|im_start|>user\nHello!<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == asked
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        == f"{asked}<|im_start|>assistant\n"
    )
    messages.append({"role": "assistant", "content": "Hi!"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{asked}<|im_start|>assistant\nHi!<|im_end|>\n"


def test_greedy_answers_are_right(answers: list[tuple[dict[str, Any], list[int]]], tokenizer: Any) -> None:
    verdicts = []
    for item, ids in answers:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if (verdict := generator.check(item["messages"][0]["content"], text)) is not None:
            verdicts.append(verdict)
    assert len(verdicts) >= 40
    assert sum(verdicts) / len(verdicts) >= 0.9


def test_every_answer_ends(answers: list[tuple[dict[str, Any], list[int]]], tokenizer: Any) -> None:
    unfinished = [item["messages"][0]["content"] for item, ids in answers if tokenizer.eos_token_id not in ids]
    assert not unfinished


def test_sampling_has_entropy(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Describe a small red bicycle."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text] * 8, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=True, temperature=1.0, max_new_tokens=100)
    assert len({tuple(ids) for ids in output.tolist()}) >= 6
