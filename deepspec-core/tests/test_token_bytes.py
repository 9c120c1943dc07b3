"""Masks by the bytes of tokens are those by the tokenizer's offsets, and a chunk's samples those of each alone."""

import json
import random
from typing import Any

import pytest
import torch
from attrs import evolve
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deepspec_core.data.answers import Answer, Supervision, supervised
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.encoding import Encoding, TextRow
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.data.tokenizing import Tokenisation
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

PIECES = (
    "the answer",
    " two",
    "\n",
    "X",
    "    ",
    "😀",
    "<|end|>",
    "<|pad|>",
    "e\u0301",
    "é",
    " ",
    "日本",
    "[gap]",
    "1+1",
)


def _tokenizer(kind: str) -> Any:
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    if kind == "a normaliser":
        backend.normalizer = normalizers.NFC()
    elif kind == "a token that swallows space":
        tokenizer.add_tokens([AddedToken("[gap]", lstrip=True, rstrip=True)])
    elif kind == "trimmed offsets":
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True)])
    elif kind == "no bytes":
        backend.decoder = decoders.WordPiece()
    return tokenizer


def _rows(rng: random.Random) -> list[TextRow]:
    rows = []
    for _ in range(rng.randrange(1, 9)):
        text = "X" + "".join(rng.choices(PIECES, k=rng.randrange(0, 12)))
        places = sorted(rng.choices(range(len(text) + 1), k=6))
        spans = [Answer(start=places[i], text_end=places[i + 1], end=places[i + 2]) for i in (0, 3)]
        rows.append(TextRow(text=text, spans=spans))
    return rows


@pytest.mark.parametrize(
    "kind", ["plain", "a normaliser", "a token that swallows space", "trimmed offsets", "no bytes"]
)
def test_masks_are_those_by_offsets(kind: str) -> None:
    rng = random.Random(kind)
    encoding = Encoding(tokenizer=_tokenizer(kind))
    assert (encoding.bytes is None) == (kind == "no bytes")
    for _ in range(150):
        rows, most = _rows(rng), rng.choice((1, 5, 12, 1000))
        for row, (ids_T, mask_T) in zip(rows, encoding.masked(rows, most), strict=True):
            ids, offsets = encoding.with_offsets(row.text)
            assert ids_T.tolist() == ids[:most]
            wanted = supervised(offsets[:most], row.spans)
            assert mask_T.tolist() == wanted, (row, offsets, most)


def test_a_chunk_is_each_of_its_conversations_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    tokenisation = Tokenisation(
        tokenizer=ChatTokenizer(tokenizer), fmt=tiny_format(), max_length=40, system_prompt="Be short.", vocab_size=500
    )
    rng = random.Random(0)
    conversations = []
    for number in range(40):
        said = [
            {"role": ("user", "assistant")[turn % 2], "content": "x" + "".join(rng.choices(PIECES, k=6))}
            for turn in range(rng.choice((1, 2, 2, 4)))
        ]
        conversations.append(Conversation(id=f"c{number}", messages=tuple(said)))
    conversations[7] = Conversation(id="given", messages=(), input_ids=(5, 6, 7), loss_mask=(0, 1, 0))
    conversations[8] = Conversation(id="not its own", messages=(), input_ids=(5, 500, 7), loss_mask=(0, 1, 0))
    conversations[9] = evolve(conversations[7], rewritten=(((5, 501), (6,)),))
    together = tokenisation(conversations)
    alone = [tokenisation([one])[0] for one in conversations]
    assert [one.dropped for one in together] == [one.dropped for one in alone]
    assert sum(one.dropped is not None and "too long" in one.dropped[1] for one in together) > 1
    assert sum(bool(one.samples) for one in together) > 3
    for number, token in ((8, 500), (9, 501)):
        assert together[number].dropped == ("refused", f"token id {token}, where the target has 500 tokens")
    for here, there in zip(together, alone, strict=True):
        for a, b in zip(here.samples, there.samples, strict=True):
            assert (a.id, a.original_length) == (b.id, b.original_length)
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.loss_mask, b.loss_mask)


def _chat_with_end(**flags: bool) -> Any:
    """The tiny tokenizer, whose end marker takes white space beside it."""
    tokenizer = tiny_tokenizer()
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    (end,) = (token for token in facts["added_tokens"] if token["content"] == "<|end|>")
    end.update(flags)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), chat_template=tokenizer.chat_template
    )


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.WordPiece()], ids=["bytes", "offsets"])
@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_a_marker_that_swallows_white_space_is_supervised(flags: dict[str, bool], newline: bool, decoder: Any) -> None:
    tokenizer = _chat_with_end(**flags)
    tokenizer.backend_tokenizer.decoder = decoder
    said = [("user", "1+1"), ("assistant", "two"), ("user", "X"), ("assistant", "the answer")]
    messages = tuple({"role": role, "content": content} for role, content in said)
    chat = ChatTokenizer(tokenizer)
    supervision = Supervision(newline=newline)
    samples = chat.samples(Conversation(id="c", messages=messages), tiny_format(), None, 999, supervision)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for sample in samples:
        assert sample.input_ids[sample.loss_mask].tolist().count(end) == 2 // len(samples)
    assert chat.template_fingerprint(tiny_format(), None) != ChatTokenizer(tiny_tokenizer()).template_fingerprint(
        tiny_format(), None
    )


@pytest.mark.parametrize("change", ["a normaliser", "a space before"])
def test_spaces_are_supervised_where_trimmed_offsets_alone_tell(change: str) -> None:
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if change == "a normaliser":
        backend.normalizer = normalizers.NFC()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoding = Encoding(tokenizer=tokenizer)
    head, said, rest = "<|start|>assistant\n", "    if e\u0301:\n        X\n\n   日  ", "\n  X"
    end = len(head) + len(said)
    row = TextRow(text=head + said + "<|end|>" + rest, spans=[Answer(start=len(head), text_end=end, end=end + 7)])
    ((ids_T, mask_T),) = encoding.masked([row], 999)
    (begin, *_), stop = mask_T.nonzero()[0], ids_T.tolist().index(1) + 1
    assert mask_T.tolist() == [begin <= place < stop for place in range(len(ids_T))]
    assert tokenizer.decode(ids_T[mask_T]).replace("\u00e9", "e\u0301").replace(" ", "") == (
        said.replace(" ", "") + "<|end|>"
    )
    assert tokenizer.decode(ids_T[mask_T]).count(" ") >= said.count(" ")
