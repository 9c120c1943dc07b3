"""Which text is supervised, to the token: golden strings, the property behind them, truncation, given tokens."""

import random
from collections import Counter

import pytest
import torch
from attrs import evolve

from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.answers import Supervision
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.tokenize import ChatTokenizer, Dropped
from deepspec_core.data.tokenizing import tokenize_all
from deepspec_core.errors import DataError
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

FMT = tiny_format()


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


def _conversation(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))
    return Conversation(id="c", messages=messages)


def _spans(tokenizer: ChatTokenizer, sample) -> list[str]:
    """The supervised text, one string a contiguous run of tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, flag in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run) for run in runs]


def _tokenize(tokenizer: ChatTokenizer, conversation: Conversation, max_length: int = 4096, system: str | None = None):
    (sample,) = tokenizer.samples(conversation, FMT, system, max_length)
    return sample


def test_golden(tokenizer: ChatTokenizer) -> None:
    sample = _tokenize(tokenizer, _conversation("What?", "One.", "And then?", "Two, three. "), system="Be short.")
    assert tokenizer.decode(sample.input_ids) == (
        "<|start|>system\nBe short.<|end|>\n"
        "<|start|>user\nWhat?<|end|>\n<|start|>assistant\nOne.<|end|>\n"
        "<|start|>user\nAnd then?<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\nTwo, three.<|end|>\n"
    )
    assert _spans(tokenizer, sample) == ["One.<|end|>", "Two, three.<|end|>"]
    # Cut one token after the last supervised one: here the newline after the marker, which ends the text anyway.
    assert sample.original_length == len(sample.input_ids)
    assert not sample.loss_mask[-1]


@pytest.mark.parametrize(
    ("turns", "supervised"),
    [
        (("What?", "Xylophones."), ["Xylophones.<|end|>"]),
        (("same", "same", "same", "same"), ["same<|end|>", "same<|end|>"]),
        (("assistant\n", "user\n", "What?", "\n\nlines\n\n"), ["user<|end|>", "lines<|end|>"]),
        (("ask", "b", "What?"), ["b<|end|>"]),
        (("ask 😀", "naïve 😀👍🏽 日本"), ["naïve 😀👍🏽 日本<|end|>"]),
    ],
)
def test_only_the_assistant_is_supervised(
    tokenizer: ChatTokenizer, turns: tuple[str, ...], supervised: list[str]
) -> None:
    assert _spans(tokenizer, _tokenize(tokenizer, _conversation(*turns))) == supervised


@pytest.mark.parametrize(
    "turns",
    [
        ("<|start|>assistant\nI am you<|end|>", "No."),
        ("a", "b", "<|end|>\n<|start|>assistant\nfake<|end|>\n", "d"),
        ("What?", "Yes.<|end|>\n<|start|>user\nAnd you?<|end|>\n<|start|>assistant\nNo."),
    ],
)
def test_text_with_the_template_s_own_markers_is_dropped_and_counted(
    tokenizer: ChatTokenizer, turns: tuple[str, ...]
) -> None:
    counts: Counter[str] = Counter()
    dropped: list[Dropped] = []
    kept = tokenize_all(
        [_conversation(*turns), _conversation("What?", "One.")], tokenizer, FMT, system_prompt=None, max_length=64,
        min_supervised_tokens=1, counts=counts, on_drop=dropped.append,
    )  # fmt: skip
    assert len(list(kept)) == counts["samples"] == counts["control_tokens"] == 1
    assert "<|" in dropped[0].reason
    with pytest.raises(DataError, match=r"control token.*\n.*<\|"):
        tokenizer.render_prompt([{"role": "user", "content": " ".join(turns)}])
    # The template writes no padding, and no target is known that stops there: its name in a text is text.
    assert tokenizer.control_tokens() == ("<|end|>", "<|start|>")


def test_text_with_a_token_at_which_the_target_stops_is_dropped(tokenizer: ChatTokenizer) -> None:
    """A stop token that no template writes, such as <|endoftext|>: web dumps have it in the middle of answers."""
    stopping = ChatTokenizer(tokenizer.tokenizer, stop_ids=(1, 0, 65))
    counts: Counter[str] = Counter()
    samples = tokenize_all(
        [_conversation("What?", "One.<|pad|>Two?"), _conversation("<|pad|>?", "One."), _conversation("A", "B")],
        stopping, FMT, system_prompt=None, max_length=64, min_supervised_tokens=1, counts=counts,
    )  # fmt: skip
    assert len(list(samples)) == 1
    assert counts["control_tokens"] == 2
    # Ordinary text stays text, also where its token is a stop token. Nothing else is asked of the template's own.
    assert stopping.in_mode(True).refused_tokens() == ("<|end|>", "<|pad|>", "<|start|>")
    assert stopping.control_tokens() == ("<|end|>", "<|start|>")


def test_a_template_that_leaves_out_what_was_said_is_refused(tokenizer: ChatTokenizer) -> None:
    """The tiny template knows neither tools nor calls: an answer that is a call alone would be rendered as nothing."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    asked = {"role": "user", "content": "Rain in Oslo?"}
    rows = {
        "the call of 'weather'": Conversation(
            id="1", messages=(asked, {"role": "assistant", "content": "", "tool_calls": [call]})
        ),
        "the tool 'weather'": Conversation(
            id="2", messages=(asked, {"role": "assistant", "content": "No."}), tools=(tool,)
        ),
    }
    for says, row in rows.items():
        with pytest.raises(DataError, match=says):
            tokenizer.samples(row, FMT, None, 64)
    with pytest.raises(DataError, match="the tool 'weather'"):
        tokenizer.render_prompt([asked], tools=[tool])


def _random_text(rng: random.Random) -> str:
    pieces = ["the answer", " two", "\n", "X", "Y", "😀", "<|pad|>", "assistant\n", "é", " ", "<think>", "1+1"]
    return "".join(rng.choices(pieces, k=rng.randint(1, 8)))


def test_supervised_tokens_are_exactly_the_answers_and_their_markers(tokenizer: ChatTokenizer) -> None:
    rng = random.Random(0)
    for _ in range(150):
        turns = [_random_text(rng).strip() or "x" for _ in range(2 * rng.randint(1, 3))]
        sample = _tokenize(tokenizer, _conversation(*turns))
        text = tokenizer.decode(sample.input_ids[sample.loss_mask])
        assert text == "".join(answer.strip() + "<|end|>" for answer in turns[1::2]), turns


def test_truncation_keeps_text_and_never_part_of_a_marker() -> None:
    # A marker of several tokens: the word is no special token of the tiny tokenizer.
    plain = tiny_tokenizer()
    plain.chat_template = plain.chat_template.replace("<|end|>", "<END>")
    tokenizer = ChatTokenizer(plain)
    fmt = ConversationFormat(assistant_start="<|start|>assistant\n", assistant_ends=("<END>",))
    conversation = _conversation("What?", "One two", "More?", "Three four")
    (whole,) = tokenizer.samples(conversation, fmt, None, 4096)
    markers = 0
    for length in range(1, whole.original_length + 1):
        (sample,) = tokenizer.samples(conversation, fmt, None, length)
        assert len(sample.input_ids) <= length
        assert sample.original_length == length
        assert torch.equal(sample.input_ids, whole.input_ids[: len(sample.input_ids)])
        spans = _spans(tokenizer, sample)
        for span, answer in zip(spans, ("One two", "Three four"), strict=False):
            assert (answer + "<END>").startswith(span)
            assert "<" not in span or span == answer + "<END>"
            markers += span.endswith("<END>")
        # Text tokens are supervised as soon as they are there.
        supervised = int(whole.loss_mask[:length].sum())
        assert supervised - int(sample.loss_mask.sum()) < len(tokenizer.encode("<END>")[0])
    assert markers > 1


def test_samples_end_one_token_after_their_last_supervised_one(tokenizer: ChatTokenizer) -> None:
    sample = _tokenize(tokenizer, _conversation("a", "b", "a long question that nobody answers"))
    last = int(sample.loss_mask.nonzero()[-1])
    assert len(sample.input_ids) == last + 2
    given = Conversation(id="g", messages=(), input_ids=(5, 6, 7, 8, 9), loss_mask=(0, 1, 0, 0, 0))
    cut = _tokenize(tokenizer, given)
    assert cut.input_ids.tolist() == [5, 6, 7]
    assert cut.original_length == 5


def test_tokens_that_came_along_are_taken_as_they_are(tokenizer: ChatTokenizer) -> None:
    given = Conversation(
        id="g", messages=_conversation("a", "b").messages, input_ids=(9, 9, 8, 7, 6), loss_mask=(0, 0, 1, 1, 0)
    )
    sample = _tokenize(tokenizer, given)
    assert sample.input_ids.tolist() == [9, 9, 8, 7, 6]
    assert sample.loss_mask.tolist() == [False, False, True, True, False]
    assert _tokenize(tokenizer, given, max_length=3).input_ids.tolist() == [9, 9, 8]


def test_short_samples_are_dropped_and_counted(tokenizer: ChatTokenizer) -> None:
    counts: Counter[str] = Counter()
    conversations = [
        _conversation("a", "b"),
        _conversation("a", "something longer, surely long enough"),
        _conversation("a"),
    ]
    kept = list(
        tokenize_all(
            conversations, tokenizer, FMT, system_prompt=None, max_length=64, min_supervised_tokens=5, counts=counts
        )
    )
    assert len(kept) == 1
    assert counts["too_short"] == counts["no_answer"] == 1
    assert counts["samples"] == 1
    assert counts["supervised_tokens"] == int(kept[0].loss_mask.sum())


def test_samples_with_the_mask_token_are_kept_and_counted(tokenizer: ChatTokenizer) -> None:
    counts: Counter[str] = Counter()
    (mask,) = tokenizer.encode("z")[0]
    kept = tokenize_all(
        [_conversation("a", "zoo"), _conversation("What?", "One.")], tokenizer, FMT, system_prompt=None, max_length=64,
        min_supervised_tokens=1, counts=counts, mask_token=mask,
    )  # fmt: skip
    assert len(list(kept)) == 2
    assert counts["mask_token"] == 1


def test_prompts_end_where_the_assistant_begins(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "What?"}]
    prompt = "<|start|>user\nWhat?<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(tokenizer.render_prompt(messages)) == prompt + "<think>\n\n</think>\n\n"
    thinking = ChatTokenizer(tokenizer.tokenizer, thinking=True)
    assert tokenizer.decode(thinking.render_prompt(messages)) == prompt
    with_system = tokenizer.decode(tokenizer.render_prompt(messages, "Be short."))
    assert with_system.startswith("<|start|>system\nBe short.<|end|>\n")
    own = [{"role": "system", "content": "Own."}, *messages]
    assert "Be short." not in tokenizer.decode(tokenizer.render_prompt(own, "Be short."))


def test_a_prompt_and_its_answer_tokenise_as_the_whole(tokenizer: ChatTokenizer) -> None:
    conversation = _conversation("What is two plus three?", "Two plus three is five.")
    sample = _tokenize(tokenizer, conversation)
    prompt = tokenizer.render_prompt(conversation.messages[:1])
    assert tuple(sample.input_ids[: len(prompt)].tolist()) == prompt
    assert int(sample.loss_mask.int().argmax()) == len(prompt)


def test_fingerprints_change_with_what_they_cover(tokenizer: ChatTokenizer) -> None:
    base = tokenizer.template_fingerprint(FMT, None)
    assert base == ChatTokenizer(tiny_tokenizer()).template_fingerprint(FMT, None)
    assert base != tokenizer.template_fingerprint(FMT, "Be short.")
    other = ChatTokenizer(tiny_tokenizer())
    assert other.tokenizer_fingerprint() == tokenizer.tokenizer_fingerprint()
    other.tokenizer.add_tokens(["new"])
    assert other.tokenizer_fingerprint() != tokenizer.tokenizer_fingerprint()


def test_disagreement_of_format_and_template_is_an_error(tokenizer: ChatTokenizer) -> None:
    conversation = _conversation("a", "b")
    for wrong in (
        ConversationFormat(assistant_start="<|im_start|>", assistant_ends=("<|end|>",)),
        ConversationFormat(assistant_start="<|start|>assistant\n", assistant_ends=("<|im_end|>",)),
    ):
        with pytest.raises(DataError, match=r"<\|im_"):
            tokenizer.samples(conversation, wrong, None, 64)
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(bare)


def test_conversations_the_template_refuses_are_dropped_and_told(tokenizer: ChatTokenizer) -> None:
    strict = tiny_tokenizer()
    strict.chat_template = (
        "{%- if messages[0].content == 'no' -%}{{ raise_exception('roles must alternate') }}{%- endif -%}"
        + strict.chat_template
    )
    counts: Counter[str] = Counter()
    dropped: list[Dropped] = []
    conversations = [evolve(_conversation("no", "b"), id="bad"), _conversation("yes", "b")]
    kept = tokenize_all(
        conversations,
        ChatTokenizer(strict),
        FMT,
        system_prompt=None,
        max_length=64,
        min_supervised_tokens=1,
        counts=counts,
        on_drop=dropped.append,
    )
    assert [sample.id for sample in kept] == ["c"]
    assert counts["refused"] == 1
    assert [drop.id for drop in dropped] == ["bad"]
    assert "roles must alternate" in dropped[0].reason


REWRITES = (
    "{%- for m in messages -%}<|start|>{{ m.role }}\n"
    "{{ m.reasoning_content + '|' if loop.last and m.reasoning_content is defined else '' }}{{ m.content }}<|end|>\n"
    "{%- endfor -%}{{ '<|start|>assistant\n' if add_generation_prompt else '' }}"
)


def test_a_template_that_rewrites_earlier_answers_gives_a_row_an_answer() -> None:
    rewriting = tiny_tokenizer()
    rewriting.chat_template = REWRITES
    tokenizer = ChatTokenizer(rewriting)
    thoughtful = [{"role": "assistant", "content": text, "reasoning_content": "why"} for text in ("One.", "Two.")]
    ask = {"role": "user", "content": "What?"}
    rows = (
        Conversation(id="c", messages=(ask, thoughtful[0], ask, thoughtful[1])),
        Conversation(id="c#2", messages=(ask, thoughtful[1])),
        Conversation(id="d", messages=(ask, {"role": "assistant", "content": "One."}, ask, thoughtful[1])),
    )
    counts: Counter[str] = Counter()
    options = {"system_prompt": None, "max_length": 99, "min_supervised_tokens": 1, "counts": counts}
    samples = {sample.id: _spans(tokenizer, sample) for sample in tokenize_all(rows, tokenizer, FMT, **options)}
    assert counts["split"] == 1
    assert samples["c#1"] == ["why|One.<|end|>"]
    assert samples["c#2"] == ["why|Two.<|end|>"]
    assert samples["d"] == ["One.<|end|>", "why|Two.<|end|>"], "nothing was rewritten"
    # An id that is taken already is made another, the same in every run.
    (renamed,) = samples.keys() - {"c#1", "c#2", "d"}
    assert renamed == f"c#2-{rows[1].digest[:12]}"


def test_answers_before_any_question_are_not_supervised(tokenizer: ChatTokenizer) -> None:
    greeting = {"role": "assistant", "content": "Welcome."}
    sample = _tokenize(
        tokenizer, evolve(_conversation("a", "b"), messages=(greeting, *_conversation("a", "b").messages))
    )
    assert _spans(tokenizer, sample) == ["b<|end|>"]


def test_what_else_may_be_supervised(tokenizer: ChatTokenizer) -> None:
    def spans(supervision: Supervision) -> list[str]:
        (sample,) = tokenizer.samples(_conversation("a", "b", "c", "d"), FMT, None, 99, supervision)
        return _spans(tokenizer, sample)

    assert spans(Supervision(newline=True)) == ["b<|end|>\n", "d<|end|>\n"]
    assert spans(Supervision(think_block=True)) == ["b<|end|>", "<think>\n\n</think>\n\nd<|end|>"]
    plain = tokenizer.template_fingerprint(FMT, None)
    assert plain == tokenizer.template_fingerprint(FMT, None, Supervision())
    assert plain != tokenizer.template_fingerprint(FMT, None, Supervision(newline=True))


def test_the_last_answer_alone(tokenizer: ChatTokenizer) -> None:
    """Of rendered conversations, of those that came with tokens, and where the template rewrites earlier answers."""
    last = Supervision(last_only=True)
    (sample,) = tokenizer.samples(_conversation("a", "b", "c", "d", "e"), FMT, None, 99, last)
    assert _spans(tokenizer, sample) == ["d<|end|>"]
    given = Conversation(
        id="g", messages=(), input_ids=(5, 6, 7, 8, 9), loss_mask=(0, 1, 0, 1, 1), rewritten=(((5,), (6,)),)
    )
    (sample,) = tokenizer.samples(given, FMT, None, 99, last)
    assert sample.id == "g"
    assert sample.loss_mask.tolist() == [False, False, False, True, True]
    assert len(tokenizer.samples(given, FMT, None, 99)) == 2
    thinking = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "reasoning_content": "Hm."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    (sample,) = tokenizer.samples(Conversation(id="t", messages=tuple(thinking)), FMT, None, 200, last)
    assert sample.id == "t"
    assert [span.endswith("2<|end|>") for span in _spans(tokenizer, sample)] == [True]
    assert tokenizer.template_fingerprint(FMT, None, last) != tokenizer.template_fingerprint(FMT, None)


@pytest.mark.parametrize("joined", [True, False])
def test_answers_whose_first_newline_is_the_headers_token_are_counted(joined: bool) -> None:
    base = tiny_tokenizer()
    base.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    if joined:
        base.add_tokens(["\n\n"])
    counts: Counter[str] = Counter()
    said = [_conversation("What?", "\nOne."), _conversation("And?", "Two."), _conversation("And?", "Three.\n\n")]
    kept = tokenize_all(
        [evolve(one, id=f"c{number}") for number, one in enumerate(said)], ChatTokenizer(base), FMT,
        system_prompt=None, max_length=64, min_supervised_tokens=1, counts=counts,
    )  # fmt: skip
    first, *_ = kept
    assert base.decode(first.input_ids[first.loss_mask]) == ("One.<|end|>" if joined else "\nOne.<|end|>")
    assert counts["joined_start"] == joined
