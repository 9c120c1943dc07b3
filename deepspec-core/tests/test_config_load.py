"""Run files are read strictly, and everything that is wrong is told at once with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.errors import ConfigError, DeepSpecError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.discovery import Plugins, load_plugins
from deepspec_core.rows.weighting_options import DecayOptions

GOOD = """
[run]
name = "a-run"
output = "runs/a-run"
stages = ["train", "evaluate"]

[target]
model = "someone/some-model"
layers = [1, 9]

[data]
sources = [{path = "talk.jsonl", weight = 2}]

[draft]
type = "toy"
"""


@pytest.fixture
def plugins(toy: Any) -> Plugins:
    toy.add(
        "fake-export",
        """
        @hookimpl
        def deepspec_exporters():
            return [
                ExportSpec(name="served", summary="", build="a:b", algorithm="toy"),
                ExportSpec(name="foreign", summary="", build="a:b", algorithm="other"),
            ]

        @hookimpl
        def deepspec_tasks():
            return [TaskSpec(name="sums", summary="", build="a:b")]

        @hookimpl
        def deepspec_builtins():
            return [
                BuiltinSpec(name="small-model", summary="", build="a:b", kind="model"),
                BuiltinSpec(name="small-talk", summary="", build="a:b", kind="prompts"),
            ]
        """,
    )
    return load_plugins()


class Loader:
    """Writes a run file and loads it."""

    def __init__(self, folder: Path, plugins: Plugins) -> None:
        self.path, self.plugins = folder / "run.toml", plugins

    def __call__(self, text: str = GOOD, *overrides: str) -> RunFile:
        self.path.write_text(text)
        return load_run_file(self.path, overrides=overrides, plugins=self.plugins)

    def problems(self, text: str = GOOD, *overrides: str) -> dict[str, DeepSpecError]:
        """Path -> problem."""
        with pytest.raises(ConfigError) as caught:
            self(text, *overrides)
        found = caught.value.problems
        rendered = str(caught.value)
        assert all(problem.render() in rendered for problem in found)
        by_path = {str(problem.where): problem for problem in found}
        assert len(by_path) == len(found), "two problems at one path"
        return by_path


@pytest.fixture
def load(tmp_path: Path, plugins: Plugins) -> Loader:
    return Loader(tmp_path, plugins)


def test_a_minimal_file_has_every_default(load: Loader) -> None:
    file = load()
    assert file.target.layers == (1, 9)
    assert file.data.sources[0].weight == 2.0
    assert type(file.data.sources[0].weight) is float
    assert file.draft.type == "toy"
    assert (file.draft.options.block_size, file.draft.options.head) == (7, None)
    assert file.draft.layer == LayerOptions()
    assert (file.loss.weighting.type, file.loss.weighting.options) == ("uniform", None)
    assert file.train.betas == (0.9, 0.999)
    assert file.evaluate.temperature == (1.0,)


def test_an_algorithm_says_what_it_is_trained_on_where_the_file_does_not(tmp_path: Path, toy: Any) -> None:
    toy.add(
        "fake-soft",
        """
        from attrs import frozen

        @frozen(kw_only=True)
        class SoftOptions:
            pass

        @hookimpl
        def deepspec_draft_models():
            return [
                DraftModelSpec(
                    name="soft", summary="", build="a:b", options=SoftOptions, class_suffix="SoftModel",
                    options_of="a:c", default_loss={"terms": {"soft_ce": 1.0}},
                )
            ]
        """,
    )
    load, soft = Loader(tmp_path, load_plugins()), GOOD.replace('"toy"', '"soft"')
    assert load(soft).loss.terms == {"soft_ce": 1.0}
    assert load(soft + "[loss]\nchunk_rows = 8\n").loss.terms == {"soft_ce": 1.0}
    assert load(soft + "[loss]\nterms = {tv = 2.0}\n").loss.terms == {"tv": 2.0}
    assert load(GOOD).loss.terms == {"ce": 1.0}
    assert list(load.problems(GOOD.replace('"toy"', '"nobody"'))) == ["draft.type"]


def test_sections_that_plugins_shape_hold_their_own_typed_options(load: Loader) -> None:
    text = GOOD + (
        "head = {rank = 4}\nwidths = [1, 2]\ndropout = 1\nlayer = {num_heads = 2}\n"
        '[loss]\nterms = {ce = 1, tv = 0.5}\nweighting = {type = "decay", gamma = 2}\n'
    )
    file = load(text)
    assert file.draft.options.head.rank == 4
    assert file.draft.options.widths == (1, 2)
    assert type(file.draft.options.dropout) is float
    assert file.draft.layer.num_heads == 2
    assert file.loss.weighting.options == DecayOptions(gamma=2.0)
    assert file.loss.terms == {"ce": 1.0, "tv": 0.5}


@pytest.mark.parametrize(
    ("override", "path", "found", "expected"),
    [
        ('train.epochs="8"', "train.epochs", '"8" (text)', "a whole number"),
        ("train.epochs=3.7", "train.epochs", "3.7 (a number)", "a whole number"),
        ("train.epochs=3.0", "train.epochs", "3.0 (a number)", "a whole number"),
        ("train.epochs=true", "train.epochs", "true (a boolean)", "a whole number"),
        ("train.lr=true", "train.lr", "true (a boolean)", "a number"),
        ("train.lr=fast", "train.lr", '"fast" (text)', "a number"),
        ("train.lr=nan", "train.lr", "nan (a number)", "a finite number"),
        ("train.lr=-1", "train.lr", "-1.0 (a number)", "a number, > 0.0"),
        ("train.betas=[0.9]", "train.betas", "[0.9] (a list)", "a list of 2 numbers"),
        ("train.betas=0.9", "train.betas", "0.9 (a number)", "a list of 2 numbers"),
        ("run.name=8", "run.name", "8 (a whole number)", "text in quotes"),
        ("run.name='a b'", "run.name", '"a b" (text)', r"text that matches [\w.-]+"),
        ("run.stages='train'", "run.stages", '"train" (text)', "a list of texts"),
        ("target.layers=3", "target.layers", "3 (a whole number)", "a list of whole numbers"),
        ("target.trust_remote_code=1", "target.trust_remote_code", "1 (a whole number)", "true or false"),
        ("loss.terms.ce='x'", "loss.terms.ce", '"x" (text)', "a number"),
        ("draft.head.rank='x'", "draft.head.rank", '"x" (text)', "a whole number"),
        ("draft.head.rank=0", "draft.head.rank", "0 (a whole number)", "a whole number, > 0"),
        ("draft.layer.head_dim=0", "draft.layer.head_dim", "0 (a whole number)", "a whole number, >= 1"),
        ("train=3", "train", "3 (a whole number)", "a table with the keys lr, global_batch_size"),
        ("draft=3", "draft", "3 (a whole number)", "a table with the keys type, layer"),
        ("evaluate.temperature=[1, -1.0]", "evaluate.temperature[1]", "-1.0 (a number)", "a number, >= 0.0"),
        ("data.held_out=0.6", "data.held_out", "0.6 (a number)", "a number, <= 0.5"),
    ],
)
def test_nothing_is_coerced(load: Loader, override: str, path: str, found: str, expected: str) -> None:
    (problem,) = load.problems(GOOD, override).values()
    assert problem.where == path
    assert str(problem.found).removesuffix(", from --set") == found
    assert str(problem.expected).startswith(expected)


def test_a_whole_number_serves_as_a_number_and_one_number_as_a_list_of_them(load: Loader) -> None:
    file = load(GOOD, "train.lr=1", "evaluate.temperature=0")
    assert (file.train.lr, file.evaluate.temperature) == (1.0, (0.0,))
    assert type(file.train.lr) is type(file.evaluate.temperature[0]) is float


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("train.epoch=1", "train.epoch", "write 'epochs'"),
        ("trian.lr=1", "trian", "write 'train'"),
        ("lr=1", "lr", "move it to train.lr"),
        ("train.temperature=1", "train.temperature", "move it to regenerate.temperature or evaluate.temperature"),
        ("draft.blocksize=1", "draft.blocksize", "write 'block_size'"),
        ("draft.layr.head_dim=1", "draft.layr", "write 'layer'"),
        ("draft.options=1", "draft.options", None),
        ("draft.head.rnk=1", "draft.head.rnk", "write 'rank'"),
        ("loss.weighting={type='decay', gama=1}", "loss.weighting.gama", "write 'gamma'"),
        ("loss.weighting.gamma=1", "loss.weighting.gamma", None),
        ("data.sources=[{path='a', wieght=1}]", "data.sources[0].wieght", "write 'weight'"),
    ],
)
def test_unknown_keys_get_the_nearest(load: Loader, override: str, path: str, fix: str | None) -> None:
    problem = load.problems(GOOD, override)[path]
    assert (problem.problem, problem.fix) == ("unknown key", fix)


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("draft.type=tyo", "draft.type", "write 'toy'"),
        ("loss.weighting.type=decy", "loss.weighting.type", "write 'decay'"),
        ("loss.terms={cee = 1}", "loss.terms.cee", "write 'ce'"),
        ("cache.format=hdf", "cache.format", "write 'hdf5'"),
        ("features.mode=onlin", "features.mode", "write 'online'"),
        ("evaluate.tasks=['sums', 'summs']", "evaluate.tasks[1]", "write 'sums'"),
        ("export.to=['servd']", "export.to[0]", "write 'served'"),
        ("run.stages=['trian']", "run.stages[0]", "write 'train'"),
        ("train.precision=bfloat", "train.precision", "write 'bfloat16'"),
        ("target.model='builtin:smal-model'", "target.model", "write 'small-model'"),
    ],
)
def test_misspelled_names_get_the_nearest(load: Loader, override: str, path: str, fix: str) -> None:
    assert load.problems(GOOD, override)[path].fix == fix


def test_a_builtin_must_be_of_the_kind_its_key_takes(load: Loader) -> None:
    file = load(GOOD, "target.model='builtin:small-model'", "data.sources=[{path='builtin:small-talk'}]")
    assert file.target.model == "builtin:small-model"
    problem = load.problems(GOOD.replace("someone/some-model", "builtin:small-talk"))["target.model"]
    assert (problem.found, problem.expected) == ("prompts", "model")


def test_tasks_may_be_held_out_or_files(load: Loader) -> None:
    tasks = ("held-out", "sums", "my/prompts.jsonl")
    assert load(GOOD, f"evaluate.tasks={list(tasks)}").evaluate.tasks == tasks


def test_a_draft_type_of_a_broken_plugin_is_explained(load: Loader, toy: Any) -> None:
    toy.add("fake-wave", "raise ImportError('needs a newer wheel')\n", plugin="wave")
    load.plugins = load_plugins()
    problem = load.problems(GOOD, "draft.type=wave", "draft.block_size=3")["draft.type"]
    assert "'wave' of fake-wave 1.0 may offer it, but is broken: ImportError: needs a newer wheel" in str(problem.fix)


def test_every_error_is_told_at_once(load: Loader) -> None:
    text = """
        colour = "red"
        required_plugins = ["fake-toy>=9"]
        [run]
        name = "a b"
        stages = ["evaluate", "trian", 3]
        seed = -1
        [target]
        model = "m"
        layers = [9, 1]
        [data]
        sources = [{path = "a", weight = "1"}, {weight = 0, pth = "b"}]
        [draft]
        type = "toy"
        block_size = 0
        num_layers = "2"
        head = {rank = 1.5}
        [draft.layer]
        num_heads = -1
        [loss]
        terms = {cee = 1, tv = "x"}
        [evaluate]
        tasks = ["suums", 3]
        limit = 0
    """
    assert set(load.problems(text, "train.lr=", "cache.shard_samples=0")) == {
        "--set train.lr=",
        "colour",
        "required_plugins[0]",
        "run.name",
        "run.output",
        "run.stages[1]",
        "run.stages[2]",
        "run.seed",
        "target.layers",
        "data.sources[0].weight",
        "data.sources[1].path",
        "data.sources[1].weight",
        "data.sources[1].pth",
        "draft.block_size",
        "draft.num_layers",
        "draft.head.rank",
        "draft.layer.num_heads",
        "loss.terms.cee",
        "loss.terms.tv",
        "evaluate.tasks[0]",
        "evaluate.tasks[1]",
        "evaluate.limit",
        "cache.shard_samples",
    }


def test_missing_sections_and_keys_are_told(load: Loader) -> None:
    problems = load.problems("[draft]\nblock_size = 3\n[target]\n")
    assert set(problems) == {"run", "data", "draft.type", "target.model", "target.layers"}
    assert problems["run"].problem == "missing section"
    assert problems["target.layers"].expected == "a list of whole numbers"


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["run.stages=[]"], "run.stages"),
        (["run.stages=['evaluate', 'train']"], "run.stages"),
        (["run.stages=['train', 'train']"], "run.stages"),
        (["features.mode=cached"], "run.stages"),
        (["features.mode=cached", "cache.path=nowhere"], "cache.path"),
        (["run.stages=['cache', 'train']"], "run.stages"),
        (["run.stages=['train', 'export']"], "export.to"),
        (["export.to=['foreign']"], "export.to[0]"),
        (["target.layers=[]"], "target.layers"),
        (["target.layers=[-2, 1]"], "target.layers"),
        (["target.layers=[1, 1]"], "target.layers"),
        (["data.sources=[]"], "data.sources"),
        (["loss.terms={}"], "loss.terms"),
    ],
)
def test_sections_must_fit_together(load: Loader, overrides: list[str], path: str) -> None:
    assert set(load.problems(GOOD, *overrides)) == {path}


def test_sections_that_do_fit_together(load: Loader, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    load(GOOD, "features.mode=cached", "cache.path=features")
    load(GOOD, "features.mode=cached", "run.stages=['cache', 'train']")
    load(GOOD, "features.mode=cached", "run.stages=['evaluate']")
    load(GOOD, "run.stages=['train', 'export']", "export.to=['served']")
    assert load(GOOD, "target.layers=[-1, 0, 7]").target.layers == (-1, 0, 7)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.name=words", "run", "name", "words"),
        ("run.name='quoted'", "run", "name", "quoted"),
        ("run.name=2026-01-31", "run", "name", "2026-01-31"),
        ("run.output=runs/x", "run", "output", "runs/x"),
        ("target.model = Owner/Name-4B", "target", "model", "Owner/Name-4B"),
        ("train.lr=3e-4", "train", "lr", 3e-4),
        ("train.max_steps=1_000", "train", "max_steps", 1000),
        ("regenerate.servers=['http://a:1/v1']", "regenerate", "servers", ("http://a:1/v1",)),
        ("data.system_prompt=a=b", "data", "system_prompt", "a=b"),
    ],
)
def test_overrides_are_toml_or_bare_words(load: Loader, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(GOOD, override), section), key) == value


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lr", "not an override"),
        ("=3", "not an override"),
        ("train..lr=3", "not an override"),
        ("train.lr=3\nrun.name='x'", "more than one value"),
        ("run.stages=[train]", "not a TOML value"),
        ("run.name='x", "not a TOML value"),
        ("run.name=", "not a TOML value"),
        ("run.name.first=3", "not a table"),
        ("data.sources.path=3", "not a table"),
    ],
)
def test_overrides_that_cannot_be_read(load: Loader, override: str, problem: str) -> None:
    (only,) = load.problems(GOOD, override).values()
    assert (only.problem, only.where) == (problem, f"--set {override}")


def test_overrides_win_in_order_and_are_named_in_errors(load: Loader) -> None:
    assert load(GOOD, "run.seed=1", "run.seed=2").run.seed == 2
    assert load.problems(GOOD, "run.seed=x")["run.seed"].found == '"x" (text), from --set'


def test_toml_errors_name_line_and_column(load: Loader) -> None:
    with pytest.raises(ConfigError, match="not TOML") as caught:
        load("[run]\nname = = 3\n")
    assert caught.value.where == f"{load.path}, line 2, column 8"


def test_files_that_cannot_be_read(load: Loader, tmp_path: Path) -> None:
    load()
    for name, expected in (("ru.toml", f"use {load.path}"), ("zzzzzzzz", f"use {load.path}")):
        with pytest.raises(ConfigError, match="no such run file") as caught:
            load_run_file(tmp_path / name, plugins=load.plugins)
        assert caught.value.fix == expected
    with pytest.raises(ConfigError, match="there is no folder"):
        load_run_file(tmp_path / "nowhere" / "run.toml", plugins=load.plugins)
    with pytest.raises(ConfigError, match="this is a folder"):
        load_run_file(tmp_path, plugins=load.plugins)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_run_file(tmp_path / "binary.toml", plugins=load.plugins)


def test_options_of_every_supported_type_are_strict(load: Loader, toy: Any) -> None:
    toy.add(
        "fake-rich",
        """
        from collections.abc import Mapping, Sequence
        from pathlib import Path
        from typing import Literal
        from attrs import field, frozen

        @frozen(kw_only=True)
        class RichOptions:
            mode: Literal["fast", "slow"] = "fast"
            either: int | str | tuple[int, ...] = 0
            scales: Sequence[float] = ()
            pairs: tuple[tuple[int, str], ...] = ()
            extra: Mapping[str, int] = field(factory=dict)
            where: Path | None = None
            low: int = 0
            high: int = field(default=1)

            @high.validator
            def _above(self, attribute, value):
                if value <= self.low:
                    raise ValueError("high must be above low")

        @hookimpl
        def deepspec_weightings():
            return [ComponentSpec(name="rich", summary="", build="a:b", options=RichOptions)]
        """,
    )
    load.plugins = load_plugins()

    def weighting(keys: str) -> str:
        return f'{GOOD}[loss]\nweighting = {{type = "rich", {keys}}}\n'

    options = load(
        weighting('either = [1], scales = [1, 2], pairs = [[1, "a"]], extra = {a = 1}, where = "x/y"')
    ).loss.weighting.options
    assert (options.either, options.scales, options.pairs) == ((1,), (1.0, 2.0), ((1, "a"),))
    assert (options.extra, options.where) == ({"a": 1}, Path("x/y"))
    text = weighting('mode = "fst", either = 1.5, scales = "ab", pairs = [[1, 2], [1]], extra = {a = "1"}, where = 3')
    problems = load.problems(text)
    below = "loss.weighting."
    assert {path.removeprefix(below): problem.expected for path, problem in problems.items()} == {
        "mode": 'one of "fast", "slow"',
        "either": "a whole number or text in quotes or a list of whole numbers",
        "scales": "a list of numbers",
        "pairs[0][1]": "text in quotes",
        "pairs[1]": "a list of a whole number, text in quotes",
        "extra.a": "a whole number",
        "where": "a path in quotes",
    }
    assert problems[below + "mode"].fix == "write 'fast'"
    assert load.problems(weighting("low = 5, high = 2"))["loss.weighting"].found == "high must be above low"


def test_options_whose_types_cannot_be_resolved_are_the_plugin_s_fault(load: Loader, toy: Any) -> None:
    toy.add(
        "fake-lost",
        """
        from attrs import frozen

        @frozen(kw_only=True)
        class LostOptions:
            size: Missing = 1

        @hookimpl
        def deepspec_weightings():
            return [ComponentSpec(name="lost", summary="", build="a:b", options=LostOptions)]
        """,
    )
    load.plugins = load_plugins()
    problem = load.problems(GOOD, "loss.weighting={type='lost', size=3}")["loss.weighting.type"]
    assert problem.problem == "the options of 'lost' cannot be read"
    assert "'Missing' is not defined" in str(problem.found)
