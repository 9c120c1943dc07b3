"""Splits, mixing, doubles and missing files."""

import gzip
import json
import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec_core.config.schema import SourceOptions
from deepspec_core.data import source_rows
from deepspec_core.data.bad_rows import BadRows
from deepspec_core.data.source_rows import check_source
from deepspec_core.data.sources import read_sources
from deepspec_core.errors import DataError


class Registry:
    """Offers builtin:greetings, prompts that know their split."""

    def get(self, kind: str, name: str) -> SimpleNamespace:
        assert kind == "builtin"
        return SimpleNamespace(kind="model" if name == "a-model" else "prompts")

    def load(self, kind: str, name: str):
        assert (kind, name) == ("builtin", "greetings")
        return lambda split, seed: (_row(f"{split}-{seed}-{i}") for i in range(1000))

    def blaming(self, kind: str, name: str):
        return nullcontext()


def _row(identity: str, text: str | None = None) -> dict:
    return {"id": identity, "messages": [{"role": "user", "content": text or f"Say {identity}"}]}


def _write(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def _ids(base: Path, *sources: SourceOptions, split: str = "train", held_out: float = 0.0, counts=None, seed: int = 1):
    read = read_sources(
        sources, split=split, held_out=held_out, seed=seed, base=base, registry=Registry(), counts=counts
    )
    return [conversation.id for conversation in read]


def test_splits_share_nothing_and_lose_nothing(tmp_path: Path) -> None:
    rows = [_row(f"r{i}") for i in range(400)]
    _write(tmp_path / "a.jsonl", rows)
    source = SourceOptions(path="a.jsonl")
    train = _ids(tmp_path, source, held_out=0.25)
    held = _ids(tmp_path, source, held_out=0.25, split="held_out")
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(row["id"] for row in rows)
    assert 60 < len(held) < 140
    # A property of the question: the order of the file and what else it holds do not matter.
    _write(tmp_path / "b.jsonl", rows[::-2])
    assert set(_ids(tmp_path, SourceOptions(path="b.jsonl"), held_out=0.25, split="held_out")) <= set(held)
    assert set(_ids(tmp_path, source, held_out=0.25, split="held_out", seed=2)) != set(held)
    assert _ids(tmp_path, source, held_out=0.0, split="held_out") == []


def test_limit_caps_the_train_conversations_of_its_source(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_row(f"r{i}") for i in range(100)])
    source = SourceOptions(path="a.jsonl", limit=10)
    assert len(_ids(tmp_path, source, held_out=0.2)) == 10
    assert len(_ids(tmp_path, source, held_out=0.2, split="held_out")) > 10


def test_builtins_have_a_split_of_their_own(tmp_path: Path) -> None:
    source = SourceOptions(path="builtin:greetings", limit=3)
    assert _ids(tmp_path, source, held_out=0.5) == ["train-1-0", "train-1-1", "train-1-2"]
    assert _ids(tmp_path, source, held_out=0.5, split="held_out")[0] == "held_out-1-0"
    with pytest.raises(DataError, match="not a source of conversations"):
        _ids(tmp_path, SourceOptions(path="builtin:a-model"))


def test_sources_interleave_by_weight(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_row(f"a{i}") for i in range(9)])
    _write(tmp_path / "b.jsonl.gz", [_row(f"b{i}") for i in range(9)])
    ids = _ids(tmp_path, SourceOptions(path="a.jsonl", weight=2.0), SourceOptions(path="b.jsonl.gz"))
    assert ids[:6] == ["a0", "a1", "b0", "a2", "a3", "b1"]
    assert sorted(ids) == sorted([f"{name}{i}" for name in "ab" for i in range(9)])


def test_doubles_are_dropped_and_clashes_renamed(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_row("1", "one"), _row("2", "two")])
    _write(tmp_path / "b.jsonl", [_row("1", "one"), _row("2", "another two"), _row("3", "three")])
    counts: Counter[str] = Counter()
    ids = _ids(tmp_path, SourceOptions(path="a.jsonl"), SourceOptions(path="b.jsonl"), counts=counts)
    assert +counts == {"conversations": 4, "duplicates": 1, "renamed": 1}
    assert len(set(ids)) == 4
    assert {"1", "2", "3"} < set(ids)


def test_a_saved_dataset_folder_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"conversations": [{"from": "human", "value": f"Say {i}"}]} for i in range(5)])
    table.save_to_disk(str(tmp_path / "saved"))
    assert len(set(_ids(tmp_path, SourceOptions(path="saved", limit=4)))) == 4
    (tmp_path / "plain").mkdir()
    _write(tmp_path / "plain" / "train.json", [_row("x")])
    assert _ids(tmp_path, SourceOptions(path="plain", limit=4)) == ["x"]


def test_arrays_and_parquet_are_sources_beside_json_lines(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_row("a")])
    (tmp_path / "b.json").write_text(json.dumps([_row("b")]))
    pq.write_table(pa.Table.from_pylist([_row("c")]), tmp_path / "c.parquet")
    sources = [SourceOptions(path=name) for name in ("a.jsonl", "b.json", "c.parquet")]
    assert _ids(tmp_path, *sources) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"'c\.parquet' meant"):
        _ids(tmp_path, SourceOptions(path="cc.parquet"))
    # Some programs write a folder of files under such a name.
    (tmp_path / "d.parquet").mkdir()
    pq.write_table(pa.Table.from_pylist([_row("d")]), tmp_path / "d.parquet" / "part-0.parquet")
    assert _ids(tmp_path, SourceOptions(path="d.parquet")) == ["d"]


def test_mistakes_say_where(tmp_path: Path) -> None:
    _write(tmp_path / "prompts.jsonl", [_row("1")])
    with pytest.raises(DataError, match=r"'prompts\.jsonl' meant"):
        _ids(tmp_path, SourceOptions(path="promts.jsonl"))
    with pytest.raises(DataError, match="does not exist either"):
        _ids(tmp_path, SourceOptions(path="nowhere/prompts.jsonl"))
    with pytest.raises(DataError, match="missing"):
        _ids(tmp_path, SourceOptions(path="./some-folder"))
    (tmp_path / "prompts.jsonl").open("a").write('\n{"id": "2"\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:3"):
        _ids(tmp_path, SourceOptions(path="prompts.jsonl"))
    (tmp_path / "prompts.csv").write_text("a,b")
    with pytest.raises(DataError, match="neither a file of rows nor"):
        _ids(tmp_path, SourceOptions(path="prompts.csv"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"turns": ["a"]}\n' * 1000)[:40])
    with pytest.raises(DataError, match="cannot be read"):
        _ids(tmp_path, SourceOptions(path="cut.jsonl.gz"))


def test_a_dataset_folder_names_no_data_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    _write(tmp_path / "rows.jsonl", [_row("a")])
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../rows.jsonl\n---\n"
    )
    with pytest.raises(DataError, match="outside the folder"):
        _ids(tmp_path, SourceOptions(path="data"))


def test_a_builtin_beside_another_source_is_split_by_its_questions(tmp_path: Path) -> None:
    """A file may repeat what a plugin holds out."""
    builtin = SourceOptions(path="builtin:greetings", limit=300)
    names = _ids(tmp_path, builtin, held_out=0.2, split="held_out")
    _write(tmp_path / "a.jsonl", [_row(f"mine-{name}", f"Say {name}") for name in names])
    both = (builtin, SourceOptions(path="a.jsonl"))
    questions = [
        {
            " ".join(conversation.messages[0]["content"].split()).casefold()
            for conversation in read_sources(
                both, split=split, held_out=0.2, seed=1, base=tmp_path, registry=Registry()
            )
        }
        for split in ("train", "held_out")
    ]
    assert all(questions)
    assert not questions[0] & questions[1]


def test_a_dataset_folder_that_was_edited_is_read_anew(tmp_path: Path) -> None:
    """`datasets` keeps a copy of what it read, and knows it by the files' times."""
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / "train.jsonl"
    for text in ("one", "two"):
        _write(file, [_row(text)])
        os.utime(file, ns=(10**18, 10**18))
        assert _ids(tmp_path, SourceOptions(path="data")) == [text]
    file.write_text("{broken\n")
    with pytest.raises(DataError, match="A line is not JSON"):
        _ids(tmp_path, SourceOptions(path="data"))


def test_a_broken_row_of_a_dataset_folder_is_left_out_and_kept(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder / "train-0.jsonl", [_row(str(number)) for number in range(9)])
    (folder / "train-1.jsonl").write_bytes(b'{"turns": ["\xff"]}\n{"id": "last", "turns": ["b"]}\n')
    (folder / "test.jsonl").write_text("{broken\n")
    with (folder / "train-0.jsonl").open("a") as file:
        file.write('{"turns": ["torn"\n')
    counts, kept = Counter[str](), tmp_path / "bad.jsonl"
    bad_rows = BadRows(most=0.5, keep_in=kept)
    options = {"held_out": 0.0, "seed": 1, "base": tmp_path, "registry": Registry(), "counts": counts}
    source = SourceOptions(path="data")
    found = [one.id for one in read_sources([source], split="train", bad_rows=bad_rows, **options)]
    bad_rows.finish()
    assert found == [*map(str, range(9)), "last"]
    assert +counts == {"conversations": 10, "malformed": 2}
    places = [json.loads(line)["where"] for line in kept.read_text().splitlines()]
    assert places == [f"{folder / 'train-0.jsonl'}:10", f"{folder / 'train-1.jsonl'}:1"]
    with pytest.raises(DataError, match="2 of 12 rows"):
        list(read_sources([source], split="train", bad_rows=BadRows(most=0.1), **options))


def test_files_of_a_dataset_folder_are_not_left_out_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`datasets` reads one kind of file, and names that belong to splits where there are any."""
    pytest.importorskip("datasets")
    source = SourceOptions(path="data")
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder / "a.jsonl", [_row("a")])
    pq.write_table(pa.Table.from_pylist([_row("b")]), folder / "b.parquet")
    for read in (lambda: check_source(source, base=tmp_path, registry=Registry()), lambda: _ids(tmp_path, source)):
        with pytest.raises(DataError, match=r"would not be read\n.*\n.*a\.jsonl"):
            read()
    (folder / "b.parquet").unlink()
    assert _ids(tmp_path, source) == ["a"]
    assert not caplog.records
    _write(folder / "train.jsonl", [_row("t")])
    with pytest.raises(DataError, match=r"would not be read\n.*\n.*a\.jsonl"):
        _ids(tmp_path, source)
    (folder / "a.jsonl").rename(folder / "test.jsonl")
    assert _ids(tmp_path, source) == ["t"]
    assert "which does not include test.jsonl" in caplog.text
    # What the folder itself lists is believed.
    _write(folder / "more.jsonl", [_row("m")])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n")
    assert _ids(tmp_path, source) == ["t"]
    assert "which does not include more.jsonl, test.jsonl" in caplog.text


def _of_the_hub(base: Path, patch: pytest.MonkeyPatch, bad: list[bool], most: float) -> tuple[int, str]:
    """How many conversations came, and what the error found then, for rows that are bad where `bad` says so."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": [None if is_bad else f"Say {i}" for i, is_bad in enumerate(bad)]})
    patch.setattr(source_rows, "_open_dataset", lambda *_: rows)
    kept = base / "bad.jsonl"
    read = read_sources(
        [SourceOptions(path="organisation/rows")],
        split="train",
        held_out=0.0,
        seed=1,
        base=base,
        registry=Registry(),
        bad_rows=BadRows(most=most, keep_in=kept),
    )
    came, found = 0, ""
    try:
        for _ in read:
            came += 1
    except DataError as error:
        found = f"{error.found}; {len(kept.read_text().splitlines())} kept"
    return came, found


def test_far_too_many_bad_rows_of_what_was_not_counted_before_are_told_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = [number % 2 == 0 for number in range(2000)]
    came, found = _of_the_hub(tmp_path, monkeypatch, half, 0.05)
    assert came == 100
    assert found == "101 of the first 201 rows. 101: A row holds no conversation; 101 kept"
    # Where none may be bad, the first one is too many.
    assert _of_the_hub(tmp_path, monkeypatch, [False, True, *half], 0.0)[1].startswith("1 of the first 2 rows")
    # 6% of the first rows may be 3% of all.
    few = [number < 600 and number % 100 < 6 for number in range(1200)]
    assert _of_the_hub(tmp_path, monkeypatch, few, 0.05) == (1164, "")
    # What is a little too much is told at the end.
    few = [number % 100 < 6 for number in range(1200)]
    came, found = _of_the_hub(tmp_path, monkeypatch, few, 0.05)
    assert (came, found.partition(" rows")[0]) == (1128, "72 of 1,200")
