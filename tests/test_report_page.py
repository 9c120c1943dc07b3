"""The HTML page of evaluations: whole, self-contained, escaped; its answers; and what is said without matplotlib."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.latex import escaped, latex_table
from deepspec_core.evaluation.sealed_json import write_sealed
from deepspec_core.reporting.samples import MOST_TOKENS, read_samples, sample_of

VOID = {"meta", "path", "use", "rect", "br"}


class Page(HTMLParser):
    """What a page holds: the tags that are open, how often each id stands there, attributes, headings, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def changed(folder: Path, **values: Any) -> None:
    path = folder / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.slow
def test_the_stage_writes_a_whole_page(judged_run: Path) -> None:
    text = (judged_run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.headings == [
        "Figures", "Accepted length", "Acceptance by position", "Reliability of confidences", "Reliability by position",
        "Accepted length by context", "Where the time goes", "Size and memory", "Answers by round", "Checks",
        "To reproduce",
    ]  # fmt: skip
    results = json.loads((judged_run / "metrics.json").read_text())["results"]
    positions = [len(one["confidence"]["positions"]) for one in results]
    assert page.tags["svg"] == 1 + 3 * 2 + sum(positions) + 1  # two temperatures of one task
    assert max(page.ids.values()) == 1
    # Nothing is fetched, nothing is executed, and every colour follows the page's theme.
    assert "http" not in text.replace("http-equiv", "")
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert not {"src", "onclick", "onload"} & page.attributes
    assert not re.search(r"(fill|stroke): #", text)
    whole = "".join(page.words)
    report = json.loads((judged_run / "metrics.json").read_text())
    for part in (report["draft"]["revision"], report["results"][0]["prompts_digest"], report["machine"]["torch"]):
        assert part in whole
    assert "[evaluate]\ntasks = " in whole  # its run file


@pytest.mark.slow
def test_several_runs_side_by_side_and_the_same_bytes_again(
    judged_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(judged_copy, "other")
    changed(Path("other"), run="the other")
    for name in ("a.html", "b.html"):
        assert main(["report", "run", "other", "--html", name]) == 0
    assert "written to a.html" in capsys.readouterr().out
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()
    page = Page(Path("a.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags["svg"] == Page(Path("run/report.html").read_text(encoding="utf-8")).tags["svg"]
    assert max(page.ids.values()) == 1
    assert page.words.count("the other") >= 2


def test_what_comes_from_data_is_escaped(judged_copy: Path) -> None:
    evil = '<script>alert("$x_1$")</script>'
    report = json.loads((judged_copy / "metrics.json").read_text())
    changed(
        judged_copy,
        run=evil,
        results=[{**one, "task": evil} for one in report["results"]],
        settings={**report["settings"], evil: evil},
    )
    place = judged_copy / "evaluate" / "samples.json"
    samples = [
        {**one, "task": evil, "prompt": evil, "pieces": [{"round": 0, "drafted": False, "tokens": 1, "text": evil}]}
        for one in read_samples(place)
    ]
    write_sealed(place, {"samples": samples}, form="deepspec-samples", version=1)
    (judged_copy / "config.toml").write_text(evil)
    assert main(["report", "run", "--html", "page.html"]) == 0
    page = Page(Path("page.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags["script"] == 0
    assert "".join(page.words).count(evil) > 10


def test_samples_that_were_edited_are_refused(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = judged_copy / "evaluate" / "samples.json"
    place.write_text(place.read_text().replace('"round": 0', '"round": 9', 1))
    assert main(["report", "run", "--html", "page.html"]) == 2
    assert "the file of samples was edited" in capsys.readouterr().err
    place.unlink()  # as beside older evaluations
    assert main(["report", "run", "--html", "page.html"]) == 0
    assert "Answers by round" not in Path("page.html").read_text(encoding="utf-8")


def test_without_matplotlib(
    judged_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says what to install. The stage leaves the page out, says so, and finishes."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", "run", "--html", "page.html"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'deepspec-core[report]'" in said
    assert "Traceback" not in said
    assert not Path("page.html").exists()
    (judged_copy / "report.html").unlink()
    record = judged_copy / "evaluate" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    text = (judged_copy / "config.toml").read_text()
    Path("again.toml").write_text(re.sub(r"^output = .*$", f'output = "{judged_copy}"', text, flags=re.MULTILINE))
    assert main(["run", "again.toml"]) == 0
    assert "report.html is left out" in capsys.readouterr().err
    assert not (judged_copy / "report.html").exists()


def _completion(output: tuple[int, ...], *rounds: tuple[int, int, int]) -> Completion:
    return Completion(
        id="x", prompt_ids=(65,), output_ids=output, finish_reason="stop", rounds=tuple(Round(*one) for one in rounds)
    )


def _bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_sample_says_who_wrote_what_in_which_round() -> None:
    # The last round commits four tokens; the output ends after two of them.
    found = sample_of(_completion(tuple(b"abcdefg"), (3, 2, 3), (3, 0, 1), (3, 3, 4)), _bytes)
    assert [(piece["round"], piece["drafted"], piece["text"]) for piece in found["pieces"]] == [
        (0, False, "a"),
        (1, True, "bc"),
        (1, False, "d"),
        (2, False, "e"),
        (3, True, "fg"),
    ]
    assert (found["prompt"], found["left_out"]) == ("A", 0)


def test_the_pieces_of_a_sample_are_the_answer() -> None:
    """Also where a character has several tokens, of several rounds."""
    text = "naïve 𝄞 ☃"
    ids = tuple(text.encode())
    found = sample_of(_completion(ids, *[(1, 1, 2)] * len(ids)), _bytes)
    assert "".join(piece["text"] for piece in found["pieces"]) == text
    assert sum(piece["tokens"] for piece in found["pieces"]) == len(ids)
    long = sample_of(_completion((97,) * (MOST_TOKENS + 5), *[(1, 1, 2)] * MOST_TOKENS), _bytes)
    assert long["left_out"] == 5
    assert sum(piece["tokens"] for piece in long["pieces"]) == MOST_TOKENS


def test_tables_for_papers(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(judged_copy, run="50%_of $x^2$ & \\more")
    assert main(["report", "run", "--latex"]) == 0
    table = capsys.readouterr().out
    assert r"50\%\_of \$x\textasciicircum{}2\$ \& \textbackslash{}more (dspark)" in table
    body = table[table.index(r"\midrule") : table.index(r"\bottomrule")].splitlines()[1:]
    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", table)
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 and line.endswith(r"\\") for line in body)
    assert len(body) == 2
    assert main(["report", "run", "--markdown"]) == 0
    assert "| draft | task |" in capsys.readouterr().out


def test_latex_is_text_as_it_was() -> None:
    assert escaped("a\n{b}~#") == r"a \{b\}\textasciitilde{}\#"
    assert latex_table(["x", "n"], [["a", "1"]], left=["x"], notes=["1 & 2"]).splitlines()[1:] == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"x & n \\",
        r"\midrule",
        r"a & 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
        r"1 \& 2",
    ]
