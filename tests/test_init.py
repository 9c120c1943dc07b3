"""`deepspec init`: what it writes passes the check and runs, for every family and every kind of draft."""

import re
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deepspec_core.cli.init import write_run_file
from deepspec_core.cli.main import main
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.train_options import TrainOptions
from deepspec_core.errors import ConfigError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.pipeline.checking import check_before
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import plan
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.plugins.specs import Recipe
from deepspec_core.targets.taps import check_taps, spread_taps

STRICT = """
from attrs import frozen
from deepspec_core.plugins import DraftModelSpec, hookimpl

@frozen(kw_only=True)
class StrictOptions:
    width: int

@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="strict", summary="", build="strict_model:Strict", options=StrictOptions, class_suffix="Strict",
        options_of="strict_model:read",
    )
"""
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16),
    "gemma4": Gemma4TextConfig(**SIZES, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}
STYLES = {"qwen2": "qwen3", "mistral": "qwen3", "gemma4": "llama"}
DRAFTS = ("dflash", "dspark", "eagle3")


def _target(folder: Path, config: Any, **tokens: str) -> Path:
    """A directory with a config and a tokenizer, and no weights at all."""
    registry = load_plugins().registry
    adapter = registry.load("target", registry.adapter_for(config.model_type).name)
    said = adapter(config, LayerOptions(intermediate_size=64)).conversation_format()
    vocabulary = {"<pad>": 0, "<end>": 1, **{char: i + 2 for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = (
        "{% for m in messages %}{{ '<" + "user>' + m.content if m.role != 'assistant' else START + m.content + END }}"
        "{% endfor %}{{ START if add_generation_prompt else '' }}"
    )
    for name, text in (("START", said.assistant_start), ("END", said.assistant_ends[0])):
        template = template.replace(name, repr(text))
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=template, **tokens
    ).save_pretrained(folder)
    return folder


def _load(path: Path) -> RunFile:
    return load_run_file(path, plugins=load_plugins())


@pytest.mark.parametrize(("family", "draft"), [(name, DRAFTS[i % 3]) for i, name in enumerate(FAMILIES)])
def test_every_family(family: str, draft: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _target(tmp_path / "models" / "target", FAMILIES[family])
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"turns": ["Hi {number}"]}}\n' for number in range(200)))
    (tmp_path / "files").mkdir()
    out = tmp_path / "files" / "train.toml"
    assert main(["init", "models/target", "--draft", draft, "--data", "rows.jsonl", "-o", str(out)]) == 0
    assert main(["config", "check", str(out)]) == 0
    file = _load(out)
    # Paths are relative to the run file, wherever one stood.
    assert file.target.model == "../models/target"
    assert file.data.sources[0].path == "../rows.jsonl"
    assert file.target.layers == (1, 2, 3, 4, 5)
    assert (file.draft.layer.intermediate_size is not None) == (family == "qwen3_moe")
    # A style is recommended where no engine has layers like the target's, and some engine gives what the draft reads.
    assert file.draft.layer.style == STYLES.get(family)
    assert ("No installed export format" in out.read_text()) == (family in STYLES)
    if draft != "eagle3":
        assert file.draft.options.mask_token_id == len(AutoTokenizer.from_pretrained(tmp_path / "models" / "target"))
    # Config, taps, tokenizer and the draft's shape fit each other, without a weight.
    run = Run(file=file, path=out, plugins=load_plugins())
    check_before(run, plan(run))
    text = out.read_text()
    assert "bytes a token" in text
    assert "trained parameters" in text


@pytest.mark.parametrize("draft", DRAFTS)
def test_defaults_are_the_plugins_own(draft: str, tmp_path: Path) -> None:
    out = tmp_path / "train.toml"
    assert main(["init", "builtin:tiny-qwen3", "--draft", draft, "-o", str(out), "--recipe", "published"]) == 0
    file, spec = _load(out), load_plugins().registry.get("draft", draft)
    mask = {} if draft == "eagle3" else {"mask_token_id": 3}
    assert file.draft.options == spec.options(**mask)
    assert file.loss.terms == dict(spec.default_loss["terms"])
    assert file.loss.weighting.type == spec.default_loss.get("weighting", {"type": "uniform"})["type"]
    bare = out.read_text().replace("[loss]", "[unused]")
    kept, _, rest = bare.partition("\n[unused]")
    out.write_text(kept + "\n\n[train]" + rest.partition("\n[train]")[2])
    assert _load(out).loss == file.loss
    assert _load(out).train == file.train
    assert file.regenerate.top_k == 20


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_recommended_recipe_says_on_what_it_was_measured(
    draft: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, published = tmp_path / "train.toml", tmp_path / "published.toml"
    command = ["init", "builtin:tiny-qwen3", "--draft", draft, "-o"]
    assert main([*command, str(published), "--recipe", "published"]) == 0
    assert "with the recommended recipe" not in capsys.readouterr().out
    assert main([*command, str(out)]) == 0
    assert "with the recommended recipe (or: --recipe published)" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "asked.toml"), "--recipe", "recommended"]) == 0
    assert (tmp_path / "asked.toml").read_text() == out.read_text()
    file, plain, spec = _load(out), _load(published), load_plugins().registry.get("draft", draft)
    recipe = spec.recommended
    assert recipe is not None
    assert file.draft.options == evolve(plain.draft.options, **recipe.options)
    assert file.loss.terms == dict({**spec.default_loss, **recipe.loss}["terms"])
    assert file.train == evolve(plain.train, **recipe.train)
    assert evolve(file, draft=plain.draft, loss=plain.loss, train=plain.train) == plain, "nothing else differs"
    held = [re.search(r"trained parameters, ([\d.]+) MB with", path.read_text()) for path in (out, published)]
    assert float(held[0][1]) < float(held[1][1]), "Muon has one moment"  # type: ignore[index]
    assert file != plain
    comments = " ".join(line.removeprefix("# ") for line in out.read_text().splitlines() if line.startswith("#"))
    sets = {
        "dspark": "draft.confidence_gradient, loss.terms, train.optimizer",
        "dflash": "train.optimizer",
        "eagle3": "draft.count, train.optimizer",
    }[draft]
    assert f"The recommended recipe sets {sets}. {recipe.evidence}" in comments
    assert "ecommended" not in published.read_text()


def test_no_recipe_is_recommended_without_evidence(
    tmp_path: Path, example_plugin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then a new file has the published settings, unless a recommended recipe is asked for."""
    example_plugin("deepspec-medusa")
    out = tmp_path / "train.toml"
    command = ["init", "builtin:tiny-qwen3", "--draft", "medusa", "-o", str(out)]
    assert main([*command, "--recipe", "recommended"]) == 2
    assert "no recipe is recommended for drafts of type 'medusa'" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    assert "with the recommended recipe" not in capsys.readouterr().out
    assert "this section is the published recipe" in out.read_text()


def test_a_recipe_with_a_table_is_written_and_one_with_a_mistake_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, get = tmp_path / "train.toml", Registry.get
    command = ["init", "builtin:tiny-qwen3", "--draft", "dspark", "-o", str(out), "--recipe", "recommended"]

    def recommend(**parts: Any) -> None:
        def with_recipe(registry: Registry, kind: str, name: str, **found: Any) -> Any:
            spec = get(registry, kind, name, **found)
            recipe = Recipe(evidence="Better.", **parts)
            return evolve(spec, recommended=recipe) if (kind, name) == ("draft", "dspark") else spec

        monkeypatch.setattr(Registry, "get", with_recipe)

    for parts in ({"options": {"mask_token_id": 7}}, {"loss": {"weigting": {"type": "uniform"}}}):
        recommend(**parts)
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "the recommended recipe of draft type 'dspark' cannot be used" in said
        assert "deepspec-dspark" in said
        assert not out.exists()
    # Each key is right, and what they say together is not.
    recommend(train={"evaluation": {"stop_after": 2}})
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the recommended recipe of draft type 'dspark' cannot be used" in said
    assert "recommended of 'dspark', train." in said
    assert not out.exists()
    train = {"optimizer": "muon", "lr": 1e-3, "betas": (0.9, 0.95)}
    recommend(options={"markov": {"rank": 64}}, loss={"terms": {"ce": 1.0}}, train=train)
    assert main(command) == 0
    file = _load(out)
    assert (file.draft.options.markov.rank, file.loss.terms) == (64, {"ce": 1.0})
    assert file.train == TrainOptions(**train)
    assert "draft.markov, loss.terms, train.optimizer, train.lr, train.betas. Better." in out.read_text()
    assert "published recipe" not in out.read_text()


def test_a_plugins_odd_texts_are_quoted_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss terms may have a dot in their name. The settings of a plugin are checked whatever the recipe is."""
    out, get = tmp_path / "train.toml", Registry.get
    command = ["init", "builtin:tiny-qwen3", "--draft", "dspark", "--recipe", "published", "-o", str(out)]

    def defaults(**loss: Any) -> None:
        def changed(registry: Registry, kind: str, name: str, **found: Any) -> Any:
            spec = get(registry, kind, name, **found)
            return evolve(spec, default_loss=loss) if (kind, name) == ("draft", "dspark") else spec

        monkeypatch.setattr(Registry, "get", changed)

    for term, said in (("no.such-term", "no.such-term"), ("\x7f b", "unknown"), ("\ud800", "not valid Unicode")):
        defaults(terms={term: 1.0})
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "the settings of draft type 'dspark' cannot be used" in told
        assert said in told
        assert not out.exists()
    defaults(terms={"ce": 1.0})
    assert main(command) == 0


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "no name for the run file"),
        ("x" * 300, "name of 300 bytes"),
        ("/proc/train.toml", "cannot be written"),
        ("/dev/full", "exists already"),
    ],
)
def test_a_place_without_a_run_file_is_refused_first(
    out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "builtin:no-such-target", "--draft", "dflash", "-o", out]) == 2
    assert said in capsys.readouterr().err


def test_half_a_run_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a valid one, of other settings."""
    out = tmp_path / "train.toml"

    def on_full_disk(path: Path, mode: str, **options: Any) -> Any:
        path.touch(exist_ok=False)
        return open("/dev/full", "w", encoding="utf-8")

    monkeypatch.setattr("deepspec_core.cli.init.Path.open", on_full_disk)
    with pytest.raises(ConfigError, match=r"(?s)cannot be written.*No space left"):
        write_run_file(out, "text " * 10_000)
    assert not out.exists()


def test_a_users_odd_names_are_not_a_plugins_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows-\udcff.jsonl").touch()
    command = ["init", "builtin:tiny-qwen3", "--draft", "dflash", "-o", str(tmp_path / "train.toml"), "--data"]
    assert main([*command, str(tmp_path / "rows-\udcff.jsonl")]) == 2
    assert "Error: a run file cannot have this name" in capsys.readouterr().err
    assert not (tmp_path / "train.toml").exists()


def test_commands_are_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = "my file; rm.toml"
    command = ["init", "builtin:tiny-qwen3", "--draft", "dflash", "--data", "builtin:tiny-dialogues", "-o", out]
    assert main(command) == 0
    assert "deepspec config check 'my file; rm.toml'; deepspec data show 'my file" in capsys.readouterr().out


@pytest.mark.slow
def test_the_file_runs(tmp_path: Path) -> None:
    out = tmp_path / "train.toml"
    assert (
        main(["init", "builtin:tiny-qwen3", "--draft", "dflash", "--data", "builtin:tiny-dialogues", "-o", str(out)])
        == 0
    )
    small = ("draft.num_layers=1", "draft.num_anchors=8", "train.micro_batch_size=16", "train.precision=float32")
    small = (*small, "evaluate.max_new_tokens=8", "regenerate.max_tokens=24")
    assert main(["run", str(out), "--smoke", *(part for key in small for part in ("--set", key))]) == 0
    assert (tmp_path / "runs" / "dflash-tiny-qwen3-smoke" / "report.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_file_runs_as_it_is(draft: str, tmp_path: Path) -> None:
    out = tmp_path / "train.toml"
    assert (
        main(["init", "builtin:tiny-qwen3", "--draft", draft, "--data", "builtin:tiny-dialogues", "-o", str(out)]) == 0
    )
    assert main(["run", str(out), "--smoke"]) == 0


def test_nothing_is_overwritten_and_mistakes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.toml").write_text("mine")
    assert main(["init", "builtin:tiny-qwen3", "--draft", "dflash"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("train.toml").read_text() == "mine"
    for arguments, message in (
        (["./nowhere", "--draft", "dflash"], "no such target directory"),
        (["builtin:tiny-qwen3", "--draft", "dflsh"], "dflash"),
        (["builtin:tiny-qwen3", "--draft", "dflash", "--data", "rows.jsonl"], "rows.jsonl"),
        (["builtin:tiny-qwen3", "--draft", "dflash", "--data", "builtin:tiny"], "tiny-dialogues"),
    ):
        assert main(["init", *arguments, "-o", "other.toml"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("other.toml").exists()
    assert main(["init", "builtin:tiny-qwen3", "--draft", "dflash", "-o", "no/where.toml"]) == 2


def test_mask_tokens(tmp_path: Path) -> None:
    def mask(name: str, config: Any, **tokens: str) -> tuple[int, str]:
        out = tmp_path / f"{name}.toml"
        target = _target(tmp_path / name, config, **tokens)
        assert main(["init", str(target), "--draft", "dflash", "-o", str(out)]) == 0
        text = out.read_text()
        options = _load(out).draft.options
        return options.mask_token_id, text

    value, text = mask("own", Qwen3Config(**SIZES, head_dim=16), mask_token="!")
    assert value == PreTrainedTokenizerFast.from_pretrained(tmp_path / "own").convert_tokens_to_ids("!")
    assert "the tokenizer has one" in text
    value, text = mask("published", Qwen3Config(**SIZES | {"vocab_size": 151936}, head_dim=16))
    assert value == 151669
    assert "as published" in text
    value, text = mask("full", Qwen2Config(**SIZES | {"vocab_size": 258}))
    assert value == 0
    assert "so this is the padding" in text


def test_a_draft_type_with_an_option_that_must_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "site" / "fake_strict-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-strict\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deepspec]\nstrict = strict_offers\n")
    (info.parent / "strict_offers.py").write_text(STRICT)
    monkeypatch.syspath_prepend(str(info.parent))
    out = tmp_path / "train.toml"
    assert main(["init", "builtin:tiny-qwen3", "--draft", "strict", "-o", str(out)]) == 0
    text = out.read_text()
    assert "# width: is required and has no default" in text
    assert "Its size depends on width, which must be given" in text
    # The last of the target's 12 layers, 11, cannot be tapped, and is not offered.
    assert "from 0 to 10" in text
    assert main(["config", "check", str(out)]) == 2
    assert "draft.width" in capsys.readouterr().err


def test_taps_are_spread_from_layer_1_to_the_third_last() -> None:
    assert spread_taps(36) == (1, 9, 17, 25, 33)
    assert spread_taps(40) == (1, 10, 19, 28, 37)
    assert spread_taps(6) == (0, 1, 2, 3, 4)
    for num_layers in range(1, 100):
        taps = spread_taps(num_layers)
        assert len(taps) == min(5, num_layers)
        assert check_taps(taps, num_layers) == taps


def test_published_taps_are_those_of_their_target_alone() -> None:
    adapter = load_plugins().registry.load("target", "gemma4")

    def known(**sizes: int) -> tuple[int, ...]:
        config = Gemma4TextConfig(**{**SIZES, "num_hidden_layers": 48, "hidden_size": 3840, **sizes})
        return adapter(config).architecture.known_taps

    assert known() == (5, 17, 29, 41, 46)
    assert known(hidden_size=2560) == ()
    assert known(num_hidden_layers=30) == ()
