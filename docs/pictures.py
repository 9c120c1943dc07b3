"""Draws the documentation's two pictures: python docs/pictures.py. Plain SVG, legible on light and dark pages."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, SOFT, PAPER = "#1f2933", "#52606d", "#ffffff"
BLUE, GREEN, SAND, ROSE = "#dbeafe", "#dcfce7", "#fef3c7", "#ffe4e6"


def box(x: int, y: int, width: int, title: str, lines: list[str], colour: str) -> str:
    """A rounded box: a title and lines of small text below it."""
    height = 34 + 17 * len(lines)
    parts = [
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='8' fill='{colour}' stroke='{SOFT}'/>",
        f"<text x='{x + width / 2}' y='{y + 21}' text-anchor='middle' font-size='14' font-weight='bold' fill='{INK}' "
        f"{FONT}>{escape(title)}</text>",
    ]
    parts += [
        f"<text x='{x + width / 2}' y='{y + 40 + 17 * i}' text-anchor='middle' font-size='12' fill='{SOFT}' "
        f"{FONT}>{escape(line)}</text>"
        for i, line in enumerate(lines)
    ]
    return "".join(parts)


def arrow(x1: int, y1: int, x2: int, y2: int, label: str = "") -> str:
    """A line with a head; the label is beside its middle."""
    line = f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{INK}' stroke-width='1.5' marker-end='url(#head)'/>"
    if not label:
        return line
    if x1 == x2:
        x, y, anchor = x1 + 8, (y1 + y2) / 2 + 4, "start"
    else:
        x, y, anchor = (x1 + x2) / 2, y1 - 6, "middle"
    return (
        line + f"<text x='{x}' y='{y}' text-anchor='{anchor}' font-size='12' fill='{INK}' {FONT}>{escape(label)}</text>"
    )


def text(x: int, y: int, words: str, *, size: int = 12, colour: str = SOFT, anchor: str = "start") -> str:
    """A line of text."""
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' fill='{colour}' text-anchor='{anchor}' {FONT}>{escape(words)}</text>"
    )


def token(x: int, y: int, word: str, colour: str) -> str:
    """One token of a sequence."""
    return (
        f"<rect x='{x}' y='{y}' width='64' height='28' rx='5' fill='{colour}' stroke='{SOFT}'/>"
        f"<text x='{x + 32}' y='{y + 19}' text-anchor='middle' font-size='13' fill='{INK}' {FONT}>{escape(word)}</text>"
    )


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """The whole picture."""
    head = (
        "<defs><marker id='head' markerWidth='9' markerHeight='9' refX='7' refY='4' orient='auto'>"
        f"<path d='M0,0 L8,4 L0,8 z' fill='{INK}'/></marker></defs>"
    )
    paper = f"<rect width='{width}' height='{height}' rx='10' fill='{PAPER}'/>"
    body = "\n".join([f"<title>{escape(title)}</title>", head, paper, *parts])
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img'>\n{body}\n</svg>\n"
    )


def batch() -> str:
    """The path of a batch, from conversations to the optimizer."""
    return svg(
        900,
        430,
        "The path of a batch: from conversations to gradients",
        [
            box(20, 20, 190, "Conversations", ["JSON lines, datasets", "regenerated answers"], BLUE),
            arrow(210, 54, 250, 54),
            box(250, 20, 190, "Tokens and mask", ["chat template, offsets", "answers are supervised"], BLUE),
            arrow(440, 54, 480, 54),
            box(480, 20, 190, "Preparation", ["on the host, no weights", "anchors, labels, indices"], SAND),
            arrow(670, 54, 710, 54),
            box(710, 20, 170, "Micro-batch", ["right-padded", "sequences"], SAND),
            box(
                20,
                150,
                300,
                "Target (frozen)",
                ["features of the tapped layers [B, T, C]", "last hidden state [B, T, H]"],
                BLUE,
            ),
            text(28, 236, "online: during training; cached: once"),
            arrow(320, 184, 480, 184, "features"),
            arrow(795, 88, 795, 120),
            "<line x1='795' y1='120' x2='575' y2='120' stroke='#1f2933' stroke-width='1.5'/>",
            arrow(575, 120, 575, 150),
            box(480, 150, 190, "Draft", ["the network of the", "algorithm, in its family"], GREEN),
            arrow(575, 218, 575, 270, "rows"),
            box(
                400,
                270,
                350,
                "Row engine",
                [
                    "in chunks: draft and target logits,",
                    "statistics, loss terms, and their gradients;",
                    "never logits of all rows",
                ],
                ROSE,
            ),
            arrow(400, 312, 340, 312, "sums"),
            box(40, 285, 300, "One division per step", ["all micro-batches, all processes"], ROSE),
            arrow(190, 336, 190, 370),
            box(40, 370, 300, "Optimizer", [], GREEN),
            text(400, 388, "Rows are the supervised positions, before the vocabulary projection."),
            text(400, 406, "B sequences, T tokens, C = taps x H, H hidden size."),
        ],
    )


def decoding_round() -> str:
    """One round of proposal and verification."""
    rows = [
        text(20, 34, "1. The draft proposes four tokens after the last committed one.", size=14, colour=INK),
        token(40, 50, "The", BLUE),
        token(112, 50, "fox", BLUE),
        token(200, 50, "runs", SAND),
        token(272, 50, "over", SAND),
        token(344, 50, "the", SAND),
        token(416, 50, "road", SAND),
        text(500, 68, "blue: committed, yellow: proposed"),
        text(20, 122, "2. The target scores all of them in one pass.", size=14, colour=INK),
        token(40, 138, "The", BLUE),
        token(112, 138, "fox", BLUE),
        token(200, 138, "runs", GREEN),
        token(272, 138, "over", GREEN),
        token(344, 138, "a", ROSE),
        token(416, 138, "hill", PAPER),
        text(500, 148, "the target's own choice at each position"),
        text(500, 166, "it agrees with two tokens, then differs"),
        text(20, 210, "3. The agreed tokens are committed, and then the target's own token.", size=14, colour=INK),
        token(40, 226, "The", BLUE),
        token(112, 226, "fox", BLUE),
        token(200, 226, "runs", BLUE),
        token(272, 226, "over", BLUE),
        token(344, 226, "a", BLUE),
        text(430, 244, "3 tokens in one pass of the target: this round's accepted length is 3"),
        text(
            20, 290, "At temperature 0 this is the target's own output, token for token. Above it, a proposed token is"
        ),
        text(
            20,
            308,
            "accepted with probability min(1, p / q), and the first rejected one is replaced by a sample from",
        ),
        text(20, 326, "max(0, p - q), normalised. So the output has the target's distribution."),
    ]
    return svg(900, 345, "A decoding round: propose, verify, commit", rows)


def main() -> None:
    """Write both files beside this one."""
    (HERE / "batch.svg").write_text(batch(), encoding="utf-8")
    (HERE / "round.svg").write_text(decoding_round(), encoding="utf-8")


if __name__ == "__main__":
    main()
