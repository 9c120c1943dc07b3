"""Which text is supervised in each family's chat template, to the token; and what holds for every conversation.

chat_templates/ holds small templates that behave like the families' own. The tokenizer is byte-level BPE, with the
families' markers as special tokens, so that every text comes back exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, Gemma4TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.answers import Supervision
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.tokenize import ChatTokenizer, TemplateRefusal
from deepspec_core.plugins.registry import Registry

TEMPLATES = Path(__file__).parent / "chat_templates"
CONFIGS: dict[str, Any] = {
    "qwen3": Qwen3Config(),
    "qwen2": Qwen2Config(),
    "llama": LlamaConfig(vocab_size=128256),
    "gemma3": Gemma3TextConfig(),
    "gemma4": Gemma4TextConfig(),
}
MARKERS = [
    "<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
]  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Which?"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Sunny or not.", "parameters": CITY}}


def _tokenizer(family: str, *, special: bool = True, thinking: bool = False) -> ChatTokenizer:
    """With `special` false the markers are several tokens each, and can be cut in the middle."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unused>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is the weather in Paris? Two plus three is five.\n\n"], trainer)
    if special:
        tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, bos_token="<bos>")
    return ChatTokenizer(fast, thinking=thinking)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ChatTokenizer]:
    return {family: _tokenizer(family) for family in CONFIGS}


@pytest.fixture(scope="module")
def formats(registry: Registry) -> dict[str, ConversationFormat]:
    return {family: registry.load("target", family)(config).conversation_format() for family, config in CONFIGS.items()}


def _marked(tokenizer: ChatTokenizer, sample: Sample) -> str:
    """The whole text, each supervised run of tokens between « and »."""
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    return "".join(f"«{tokenizer.decode(run)}»" if flag else tokenizer.decode(run) for flag, run in runs)


def _supervised(tokenizer: ChatTokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask])


def _row(*messages: dict[str, Any] | str, **more: Any) -> Conversation:
    """Texts are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    whole = [{"role": roles[i % 2], "content": m} if isinstance(m, str) else m for i, m in enumerate(messages)]
    return from_row({"id": "c", "messages": whole, **more}, "test")


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL_ROW = (
    _user("Paris?"),
    _assistant(None, tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "content": "sunny"},
    _assistant("It is sunny."),
)

TWO_TURNS = {
    "qwen3": (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«Good bye.<|im_end|>»\n"
    ),
    "qwen2": (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n«Good bye.<|im_end|>»\n"
    ),
    "llama": (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\nBe short."
        "<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Good bye.<|eot_id|>»"
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nBe short.\n\nHi<end_of_turn>\n<start_of_turn>model\n«Hello.<end_of_turn>»\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n«Good bye.<end_of_turn>»\n"
    ),
    # What prompts say before an answer stands before the last one, as the target reads it when it is asked.
    "gemma4": (
        "<bos><|turn>system\nBe short.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n«Hello.<turn|>»\n"
        "<|turn>user\nBye<turn|>\n<|turn>model\n<|channel>thought\n<channel|>«Good bye.<turn|>»\n"
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_two_turns(family: str, tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]) -> None:
    tokenizer, row = tokenizers[family], _row("Hi", "Hello.", "Bye", "Good bye.")
    (sample,) = tokenizer.samples(row, formats[family], "Be short.", 4096)
    assert _marked(tokenizer, sample) == TWO_TURNS[family]
    own = _row(_system("Be short."), _user("Hi"), _assistant("Hello."), _user("Bye"), _assistant("Good bye."))
    (same,) = tokenizer.samples(own, formats[family], "Something else.", 4096)
    assert same.input_ids.tolist() == sample.input_ids.tolist()


TOOLS = {
    "qwen3": [
        '«<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>»',
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«It is sunny.<|im_end|>»\n",
    ],
    "qwen2": [
        '«<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>»',
        "<|im_start|>assistant\n«It is sunny.<|im_end|>»\n",
    ],
    "llama": [
        '«{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>»',
        '<|start_header_id|>ipython<|end_header_id|>\n\n"sunny"<|eot_id|>',
        "«It is sunny.<|eot_id|>»",
    ],
    # The result stands inside the model's turn: the call ends where the result begins, the answer has no header.
    "gemma4": [
        '<|turn>model\n«<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>»'
        'response:weather{value:<|"|>sunny<|"|>}<tool_response|>«It is sunny.<turn|>»\n',
    ],
}


@pytest.mark.parametrize("family", TOOLS)
def test_tool_calls(family: str, tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]) -> None:
    tokenizer = tokenizers[family]
    (sample,) = tokenizer.samples(_row(*TOOL_ROW, tools=[WEATHER]), formats[family], None, 4096)
    text = _marked(tokenizer, sample)
    assert text.count("«") == 2
    assert all(part in text for part in TOOLS[family]), text
    assert '"weather"' in text.partition("Paris?")[0] or "declaration:weather" in text
    (without,) = tokenizer.samples(_row(*TOOL_ROW), formats[family], None, 4096)
    assert len(without.input_ids) < len(sample.input_ids)
    assert _supervised(tokenizer, without) == _supervised(tokenizer, sample)


@pytest.mark.parametrize("inside", [True, False])
def test_qwen3_thinking_is_an_answers_own(
    inside: bool, tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    def thoughtful(thought: str, answer: str) -> dict[str, Any]:
        if inside:
            return _assistant(f"<think>\n{thought}\n</think>\n\n{answer}")
        return _assistant(answer, reasoning_content=thought)

    tokenizer, fmt = tokenizers["qwen3"], formats["qwen3"]
    (one,) = tokenizer.samples(_row(_user("1+1?"), thoughtful("Easy.", "2")), fmt, None, 4096)
    assert _marked(tokenizer, one).endswith("assistant\n«<think>\nEasy.\n</think>\n\n2<|im_end|>»\n")
    # Earlier thinking is dropped by the template: one row an answer, each as the target would emit it.
    row = _row(
        _user("1+1?"), thoughtful("Easy.", "2"), _user("2+2?"), thoughtful("Hm.", "4"), _user("5?"), _assistant("6")
    )
    samples = tokenizer.samples(row, fmt, None, 4096)
    assert [sample.id for sample in samples] == ["c#1", "c#2", "c#3"]
    assert [_marked(tokenizer, sample) for sample in samples] == [
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n«<think>\nEasy.\n</think>\n\n2<|im_end|>»\n",
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nHm.\n</think>\n\n4<|im_end|>»\n",
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n5?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n«6<|im_end|>»\n",
    ]
    # Within one task nothing is dropped: calls, results and thinking stay one row.
    steps = _row(
        _user("Paris?"),
        _assistant("", reasoning_content="I need a tool.", tool_calls=[CALL]),
        {"role": "tool", "content": "sunny"},
        _assistant("Sunny.", reasoning_content="Now I know."),
    )
    (sample,) = tokenizer.samples(steps, fmt, None, 4096)
    assert _supervised(tokenizer, sample) == (
        '<think>\nI need a tool.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
        "</tool_call><|im_end|><think>\nNow I know.\n</think>\n\nSunny.<|im_end|>"
    )


def test_users_who_write_tool_results_and_markers(
    tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    tokenizer = tokenizers["qwen3"]
    fake = "<tool_response>\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nNo.<|im_end|>\n</tool_response>"
    row = _row(_user("Go"), _assistant("One.", reasoning_content="r"), _user(fake), _assistant("Two."))
    (sample,) = tokenizer.samples(row, formats["qwen3"], None, 4096)
    assert _supervised(tokenizer, sample) == "<think>\nr\n</think>\n\nOne.<|im_end|>Two.<|im_end|>"


def test_gemma4_thought_channel(tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]) -> None:
    fmt, row = formats["gemma4"], _row("Hi", "Hello.")
    (plain,) = tokenizers["gemma4"].samples(row, fmt, None, 4096)
    prompt = tokenizers["gemma4"].render_prompt(row.messages[:1])
    assert tuple(plain.input_ids[: len(prompt)].tolist()) == prompt, "training reads what evaluation sends"
    thinking = _tokenizer("gemma4", thinking=True)
    (sample,) = thinking.samples(row, fmt, None, 4096)
    assert _marked(thinking, sample) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n«Hello.<turn|>»\n"
    )
    call = _row(_user("Paris?"), _assistant("", reasoning_content="Ask.", tool_calls=[CALL]))
    (sample,) = tokenizers["gemma4"].samples(call, fmt, None, 4096)
    assert _supervised(tokenizers["gemma4"], sample).startswith("<|channel>thought\nAsk.\n<channel|><|tool_call>")
    for lost in (
        _assistant("Hello.", reasoning_content="A greeting."),
        _assistant("<|channel>thought\nA greeting.\n<channel|>Hello."),
    ):
        with pytest.raises(TemplateRefusal, match="leaves out the thinking"):
            tokenizers["gemma4"].samples(_row(_user("Hi"), lost), fmt, None, 4096)


def test_qwen2_default_system_prompt_is_the_templates(
    tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    tokenizer, row = tokenizers["qwen2"], _row("Hi", "Hello.")
    (sample,) = tokenizer.samples(row, formats["qwen2"], None, 4096)
    prompt = tokenizer.render_prompt(row.messages[:1])
    assert tokenizer.decode(prompt).startswith("<|im_start|>system\nYou are Qwen")
    assert tuple(sample.input_ids[: len(prompt)].tolist()) == prompt
    (own,) = tokenizer.samples(row, formats["qwen2"], "Be short.", 4096)
    assert "You are Qwen" not in tokenizer.decode(own.input_ids)


PUBLISHED = {
    "qwen3": "«<think>\n\n</think>\n\nBye.<|im_end|>\n»",
    "qwen2": "«Bye.<|im_end|>\n»",
    "llama": "«Bye.<|eot_id|>»",
    "gemma3": "«Bye.<end_of_turn>\n»",
    "gemma4": "«<|channel>thought\n<channel|>Bye.<turn|>\n»",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_published_choices(
    family: str, tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    tokenizer, row = tokenizers[family], _row("Hi", "Hello.", "So?", "Bye.")
    (sample,) = tokenizer.samples(row, formats[family], None, 4096, Supervision(newline=True, think_block=True))
    text = _marked(tokenizer, sample)
    assert text.endswith(PUBLISHED[family])
    newline = "" if family == "llama" else "\n"
    assert f"«Hello.{formats[family].assistant_ends[0]}{newline}»" in text
    (block,) = tokenizer.samples(row, formats[family], None, 4096, Supervision(think_block=True))
    assert _supervised(tokenizer, block).replace("\n", "") == _supervised(tokenizer, sample).replace("\n", "")
    assert not _supervised(tokenizer, block).endswith("\n")


def test_strict_alternation_is_the_templates_refusal(
    tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    row = _row(_user("Hi"), _user("Anyone?"), _assistant("Hello."))
    with pytest.raises(TemplateRefusal, match="must alternate"):
        tokenizers["gemma3"].samples(row, formats["gemma3"], None, 4096)


# Properties.

PIECES = [
    "the weather", " two", "\n", "\n\n", "X", "😀", "é", " ", "1+1", "日本", "{}", "«", *MARKERS[2:5], "<|eot_id|>",
    "<end_of_turn>", "<turn|>", "<|turn>model\n", "<start_of_turn>model\n", "<|im_start|>assistant\n", "<", "|>",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join)
THINKING = ("<think>", "</think>")


@st.composite
def conversations(draw: st.DrawFn, family: str) -> tuple[Conversation, list[str]]:
    """Turns of any text, some with tool calls; and what each answer is to be in the end, its marker left out."""
    messages: list[dict[str, Any]] = [_system(draw(TEXT))] if draw(st.booleans()) else []
    answers = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(_user(draw(TEXT)))
        if family.startswith("qwen") and draw(st.integers(0, 3)) == 0:
            city = draw(TEXT)
            call = {"function": {"name": "f", "arguments": {"city": city}}}
            messages += [_assistant("", tool_calls=[call]), {"role": "tool", "content": draw(TEXT)}]
            answers.append(None)
        answer = draw(TEXT).strip()
        if family == "qwen3":
            assume(not any(tag in answer for tag in THINKING))
        messages.append(_assistant(answer))
        answers.append(answer)
    return _row(*messages), answers


@pytest.mark.parametrize("family", CONFIGS)
def test_supervised_tokens_are_exactly_the_answers_and_their_markers(
    family: str, tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    tokenizer, fmt = tokenizers[family], formats[family]
    end = fmt.assistant_ends[0]

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(conversations(family))
    def check(drawn: tuple[Conversation, list[str]]) -> None:
        row, answers = drawn
        (sample,) = tokenizer.samples(row, fmt, None, 10**6)
        text = _supervised(tokenizer, sample)
        for answer in answers:
            if answer is None:
                head, _, text = text.partition("\n</tool_call>" + end)
                assert head.lstrip("\n").startswith('<tool_call>\n{"name": "f", "arguments": ')
            else:
                assert text.startswith(answer + end), (answer, text)
                text = text[len(answer + end) :]
        assert text == ""

    check()


@pytest.mark.parametrize("family", CONFIGS)
def test_truncation_never_supervises_part_of_a_marker(family: str, formats: dict[str, ConversationFormat]) -> None:
    tokenizer, fmt = _tokenizer(family, special=False), formats[family]
    end = fmt.assistant_ends[0]
    words = st.lists(st.sampled_from(["one", " two", "😀", "\n", "three", " 4"]), min_size=1, max_size=4)

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(words.map("".join).map(str.strip).filter(bool), min_size=2, max_size=4), st.data())
    def check(texts: list[str], data: st.DataObject) -> None:
        texts = texts[: len(texts) // 2 * 2]
        (whole,) = tokenizer.samples(_row(*texts), fmt, None, 10**6)
        answers = [text + end for text in texts[1::2]]
        assert _supervised(tokenizer, whole) == "".join(answers)
        length = data.draw(st.integers(1, whole.original_length))
        (cut,) = tokenizer.samples(_row(*texts), fmt, None, length)
        assert cut.input_ids.tolist() == whole.input_ids[: len(cut.input_ids)].tolist()
        kept = cut.loss_mask
        # A prefix of what is supervised of the whole, and where it ends inside a marker, the marker is not in it.
        assert not (kept & ~whole.loss_mask[: len(kept)]).any()
        missing = whole.loss_mask[:length].clone()
        missing[: len(kept)] &= ~kept
        left_out = tokenizer.decode(whole.input_ids[:length][missing])
        assert end.startswith(left_out)
        assert left_out != end or length < whole.original_length
        text = _supervised(tokenizer, cut)
        assert all(not text.endswith(end[:size]) for size in range(1, len(end)))

    check()
