"""Run files are read strictly, and everything that is wrong is told at once with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_file_loading import GOOD, Loader

from deepspec_core.config.load import load_run_file
from deepspec_core.errors import ConfigError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.discovery import load_plugins


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
        ("train=3", "train", "3 (a whole number)", "a table with the keys lr, optimizer, global_batch_size"),
        ("draft=3", "draft", "3 (a whole number)", "a table with the keys type, layer"),
        ("evaluate.temperature=[1, -1.0]", "evaluate.temperature[1]", "-1.0 (a number)", "a number, >= 0.0"),
        ("evaluate.temperature=[1, 0, 1.0]", "evaluate.temperature", "[1.0, 0.0, 1.0] (a list)", "different numbers"),
        ("data.held_out=0.6", "data.held_out", "0.6 (a number)", "a number, <= 0.5"),
        (
            "train.evaluation.max_new_tokens=1",
            "train.evaluation.max_new_tokens",
            "1 (a whole number)",
            "a whole number, >= 2",
        ),
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
        ("draft.layer.num_attention_heads=8", "draft.layer.num_attention_heads", "write 'num_heads'"),
        ("draft.layer.num_key_value_heads=8", "draft.layer.num_key_value_heads", "write 'num_kv_heads'"),
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
    assert set(problems) == {"run", "data", "draft.type", "target.model"}
    assert problems["run"].problem == "missing section"
    assert problems["target.model"].expected == "text in quotes"


SERVERS = "features.servers=['http://host:8000/v1']"


def twice(section: str) -> str:
    """One server under two addresses."""
    return f"{section}.servers=['http://host/v1', 'http://other/v1', 'http://Host:80/v1/']"


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["run.stages=[]"], "run.stages"),
        (["run.stages=['evaluate', 'train']"], "run.stages"),
        (["run.stages=['train', 'train']"], "run.stages"),
        (["features.mode=cached"], "run.stages"),
        (["features.mode=cached", "cache.path=nowhere"], "cache.path"),
        (["run.stages=['cache', 'train']"], "run.stages"),
        (["features.mode=server", SERVERS, "features.exchange=x", "run.stages=['cache', 'train']"], "run.stages"),
        (["features.mode=server", "features.exchange=x"], "features.servers"),
        (["features.mode=server", SERVERS], "features.exchange"),
        (["features.mode=cached", SERVERS, "run.stages=['cache', 'train']"], "features.exchange"),
        ([SERVERS, "features.exchange=x"], "features.servers"),
        (["features.mode=server", SERVERS, "features.exchange=x", "cache.subset=0.5"], "cache.subset"),
        (["features.mode=server", SERVERS, "features.exchange=''"], "features.exchange"),
        (["features.mode=server", SERVERS, "features.exchange=x", "features.served_as=' '"], "features.served_as"),
        (["features.mode=server", "features.exchange=x", twice("features")], "features.servers"),
        (["run.stages=['regenerate', 'train']", twice("regenerate")], "regenerate.servers"),
        (
            [
                "run.stages=['regenerate', 'cache', 'train']",
                "features.mode=cached",
                "features.exchange=x",
                SERVERS,
                "regenerate.servers=['http://HOST:8000/']",
            ],
            "features.servers",
        ),
        (["run.stages=['train', 'export']"], "export.to"),
        (["export.to=['foreign']"], "export.to[0]"),
        (["target.layers=[]"], "target.layers"),
        (["target.layers=[-2, 1]"], "target.layers"),
        (["target.layers=[1, 1]"], "target.layers"),
        (["data.sources=[]"], "data.sources"),
        (["data.sources=[{path='a.jsonl'}, {path='builtin:small-talk', split='test'}]"], "data.sources[1].split"),
        (["data.sources=[{path='a.jsonl', split='test'}]"], "data.sources[0].split"),
        (["loss.terms={}"], "loss.terms"),
        (["loss.terms={ce = 0, tv = {start = 0, end = 0, steps = 5}}"], "loss.terms"),
    ],
)
def test_sections_must_fit_together(load: Loader, overrides: list[str], path: str) -> None:
    assert set(load.problems(GOOD, *overrides)) == {path}


def test_sections_that_do_fit_together(load: Loader, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    load(GOOD, "features.mode=cached", "cache.path=features")
    load(GOOD, "features.mode=cached", "run.stages=['cache', 'train']")
    load(GOOD, "features.mode=cached", "run.stages=['evaluate']")
    load(GOOD, "features.mode=server", SERVERS, "features.exchange=x")
    load(GOOD, "features.mode=cached", SERVERS, "features.exchange=x", "run.stages=['cache', 'train']")
    # A port, a scheme and a path make another server.
    others = ["http://host:8001/v1", "https://host:8000/v1", "http://host:8000/a/v1", "http://host:8000/b"]
    load(GOOD, "features.mode=server", f"features.servers={others}", "features.exchange=x")
    answers = [f"regenerate.servers={others}", "run.stages=['regenerate', 'train']"]
    load(GOOD, "features.mode=server", SERVERS, "features.exchange=x", *answers)
    load(GOOD, "loss.terms={ce = 0, tv = {start = 0, end = 0.5, steps = 5}}")
    load(GOOD, "run.stages=['train', 'export']", "export.to=['served']")
    assert load(GOOD, "target.layers=[-1, 0, 7]").target.layers == (-1, 0, 7)


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
    with pytest.raises(ConfigError, match="is a folder"):
        load_run_file(tmp_path, plugins=load.plugins)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_run_file(tmp_path / "binary.toml", plugins=load.plugins)
