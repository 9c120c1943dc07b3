"""`deepspec diagnose`: finds the stage at which a draft that trains well loses its acceptance, and the cause.

Measures the same figures at every stage between training and serving. Neighbouring stages differ in one thing, so the
first stage with a drop shows the cause. Known causes are also checked directly. Knows runs; diagnosis/ makes the
comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, define, evolve, field, frozen

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import check_draft, load_draft
from deepspec_core.config.schema import SERVER, EvaluateOptions
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.diagnosis import finding as names
from deepspec_core.diagnosis.decoding_check import Probe, decoding_finding, engine_outcomes, probes
from deepspec_core.diagnosis.draft_files import draft_findings, expected_config
from deepspec_core.diagnosis.feature_check import compare_features, features_finding
from deepspec_core.diagnosis.finding import Diagnosis, Finding, Stage
from deepspec_core.diagnosis.outcomes import (
    Difference,
    Outcomes,
    accepted_difference,
    accepted_interval,
    of_completions,
    share_difference,
)
from deepspec_core.diagnosis.prompt_check import prompts_finding
from deepspec_core.diagnosis.served import above_the_engine, served_outcomes
from deepspec_core.diagnosis.training_pass import acceptance_rates, outcomes_of, said_of
from deepspec_core.dtypes import dtype_name, torch_dtype
from deepspec_core.errors import ConfigError, DeepSpecError
from deepspec_core.pipeline import contents, threads
from deepspec_core.pipeline.diagnosed_server import Asked, ask
from deepspec_core.pipeline.diagnosed_texts import (
    answered,
    asked_prompts,
    header_differences,
    held_out_samples,
    online_samples,
    prompt_differences,
    samples_of,
    stored_samples,
    with_live_features,
)
from deepspec_core.pipeline.evaluated_draft import draft_of
from deepspec_core.pipeline.fingerprint import read_record
from deepspec_core.pipeline.run import Run
from deepspec_core.targets.opening import fingerprint
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.metrics_lines import METRICS, read_lines

# The number of last lines of metrics.jsonl that represent the end of training.
_LAST_LINES = 4
_COMPARED_SAMPLES = 4
# Options of evaluation that change greedy decoding. The training pass has none of them, so no stage here uses them.
_NOT_OF_TRAINING = ("turns", "repetition_penalty", "stop", "confidence_threshold", "calibration", "scheduler")
# Options that change answers only above temperature 0.
_OF_SAMPLING = ("top_p", "top_k", "min_p", "samples")


@frozen(kw_only=True)
class Extent:
    """How much is measured: the numbers of training samples, prompts, examined rounds, and new tokens of an answer."""

    samples: int = 48
    prompts: int = 24
    rounds: int = 48
    max_new_tokens: int = 128


def diagnose(
    run: Run,
    extent: Extent,
    *,
    tolerance: float = 0.1,
    served: Path | None = None,
    server: Asked | None = None,
    say: Callable[[str], None],
) -> Diagnosis:
    """Measure every stage that this run has. A server's counts come from the file `served`, or from the server itself.

    Raises ConfigError for drafts that are not trained, and other DeepSpecErrors for what cannot be loaded at all.
    """
    if not run.trains:
        raise ConfigError("drafts of this type are not trained", where=run.path, found=run.file.draft.type)
    count = threads.choose(run, ["evaluate"])["evaluate"]
    with threads.using(count):
        looking = _Looking(run=run, extent=extent, tolerance=tolerance, say=say)
        looking.missing |= left_out(run.file.evaluate)
        counted = None
        if served is not None:
            counted = served_outcomes(served, max_tokens=looking.draft.describe().max_tokens)  # known now, said now
        if server is not None:
            counted = looking.ask(server)
        looking.look_at_training()
        looking.look_at_evaluation(counted)
    return Diagnosis(
        stages=tuple(looking.stages),
        findings=tuple(looking.findings),
        facts=looking.facts,
        not_measured=looking.missing,
        tolerance=tolerance,
        about={"run": run.file.run.name, "target": run.file.target.model, "draft": str(looking.folder)},
    )


def left_out(options: EvaluateOptions) -> dict[str, str]:
    """The effects of these options on decoding that no stage of a diagnosis measures, in the form of `not_measured`."""
    usual = EvaluateOptions()
    asked = (*_OF_SAMPLING, *_NOT_OF_TRAINING) if any(options.temperature) else _NOT_OF_TRAINING
    names = [name for name in asked if getattr(options, name) != getattr(usual, name)]
    if 0 not in options.temperature:
        names.insert(0, "temperature")
    if not names:
        return {}
    said = ", ".join(f"evaluate.{name}" for name in names)
    return {"evaluation's settings": f"answers here are greedy ones to first turns, without {said}"}


@define(kw_only=True)
class _Looking:
    """A diagnosis in progress. `last` has the outcomes of the newest stage, with which the next one is compared."""

    run: Run
    extent: Extent
    tolerance: float
    say: Callable[[str], None]
    stages: list[Stage] = field(factory=list)
    findings: list[Finding] = field(factory=list)
    facts: dict[str, Any] = field(factory=dict)
    missing: dict[str, str] = field(factory=dict)
    last: Outcomes | None = None
    folder: Path = field(init=False)
    adapter: TargetAdapter = field(init=False)
    draft: DraftModel = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.folder, self.adapter, digest = draft_of(self.run)
        self._look_at_files(digest)
        self.draft = self._load(self.run.target.dtype)

    @property
    def trained_here(self) -> bool:
        """Whether the draft is the run's own, so that it can be compared with the results of training."""
        return self.run.file.evaluate.draft is None and (self.run.stage_folder("train") / METRICS).is_file()

    def ask(self, server: Asked) -> Outcomes | None:
        """The server's rounds on evaluation's prompts. This comes first, because it may be the wrong server."""
        self.say("the server")
        requests, limit = self._asked()
        counted, why = ask(self.run, requests, server, max_new_tokens=limit) if requests else (None, "no prompts")
        if counted is None:
            self.missing[names.SERVED] = why
        return counted

    def look_at_training(self) -> None:
        """The stages on training samples."""
        if not self.trained_here:
            for name in (names.RECORDED, names.REPLAYED, names.PRECISION, names.LIVE):
                self.missing[name] = "the draft was not trained in this run"
            return
        recorded, groups = self._recorded()
        cached = self.run.file.features.mode == "cached"
        self.say("training samples")
        if cached:
            samples, header = stored_samples(self.run, self.extent.samples)
            self._look_at_header(header_differences(self.run, header))
            compared = compare_features(samples[:_COMPARED_SAMPLES], self.run.target.model, self.run.file.target.layers)
            self.facts["features"] = [asdict(one) for one in compared]
            self._add(features_finding(compared))
        else:
            self.missing[names.LIVE] = (
                "training took its features from servers, and nothing of them is kept"
                if self.run.file.features.mode == SERVER
                else "training computed the features itself, with the target as it is loaded now"
            )
            samples = self._live(online_samples(self.run, self.extent.samples))
        asked = prompt_differences(self.run, samples)
        self.facts["prompts"] = [asdict(one) for one in asked]
        self._add(prompts_finding(asked))
        if not asked:
            self.missing["prompt ids"] = "no training sample is of a conversation that the run's data has now"
        own, precision = torch.float32, torch_dtype(self.run.file.train.precision)
        outcomes = self._measure(names.REPLAYED, self._load(own), samples, compute_dtype=precision)
        if recorded:
            self._judge(share_difference(recorded, groups, outcomes), what="shares of right tokens, over positions,")
        if self.run.target.dtype == own == precision:
            self.missing[names.PRECISION] = "training and evaluation compute in the same number format"
        else:
            before = outcomes
            outcomes = self._measure(names.PRECISION, self.draft, samples)
            self._judge(accepted_difference(before, outcomes, paired=True))
            self._look_at_numbers(outcomes)
        if cached:
            before = outcomes
            outcomes = self._measure(names.LIVE, self.draft, self._live(samples))
            self._judge(accepted_difference(before, outcomes, paired=True))

    def look_at_evaluation(self, counted: Outcomes | None) -> None:
        """The stages on texts outside the training data, with the engine, and on a server."""
        self.say("held-out texts")
        held_out = held_out_samples(self.run, self.extent.prompts) if self.run.file.data.sources else []
        if held_out:
            before = self.last
            outcomes = self._measure(names.HELD_OUT, self.draft, self._live(held_out))
            if before is not None:
                self._judge(accepted_difference(before, outcomes, paired=False))
        else:
            self.missing[names.HELD_OUT] = "the run holds out no conversations"
        self.say("decoding")
        completions = self._decoded()
        texts = samples_of(completions, self.run.target.architecture.max_positions)
        if not texts:
            self.missing[names.PROMPTS] = self.missing[names.ENGINE] = "no answer has two tokens"
            return
        before = self.last
        outcomes = self._measure(names.PROMPTS, self.draft, self._live(texts))
        if before is not None:
            self._judge(accepted_difference(before, outcomes, paired=False))
        self._engine(completions)
        if counted is not None:
            engine = of_completions(completions, last=True)
            self._stage(names.SERVED, counted)
            difference = accepted_difference(engine, counted, paired=False)
            self._judge(difference)
            self._add(above_the_engine(difference, self.tolerance))

    def _engine(self, completions: Sequence[Completion]) -> None:
        if not any(done.rounds for done in completions):
            return
        found: list[Probe] = probes(
            self.draft, self.run.target.model, completions, most=self.extent.rounds, seed=self.run.file.run.seed
        )
        self._stage(names.ENGINE, of_completions(completions))
        if not found:
            self.missing["rounds"] = "training forms no block where the engine's rounds begin"
            return
        trained, engine = engine_outcomes(found)
        self._judge(accepted_difference(trained, engine, paired=True), what="draft tokens accepted in the same rounds")
        seen, facts = decoding_finding(self.draft, found, type(self.adapter.rotary()))
        self.facts["decoding"] = facts
        self._add(seen)

    def _decoded(self) -> list[Completion]:
        """The engine's greedy answers to evaluation's prompts; plain ones where the draft cannot be decoded with."""
        requests, limit = self._asked()
        greedy = Sampling(temperature=0.0)
        try:
            proposer = self.draft.proposer()
            return answered(self.run, requests, sampling=greedy, max_new_tokens=limit, proposer=proposer)
        except DeepSpecError as error:
            self._add(
                Finding(
                    name="engine",
                    says=f"Decoding with this draft ends with an error: {error.problem}.",
                    fix=error.fix or "Look at the draft's proposer.",
                    explains=(names.ENGINE,),
                )
            )
            self.missing[names.ENGINE] = error.problem
            return answered(self.run, requests, sampling=greedy, max_new_tokens=limit)

    def _asked(self) -> tuple[list[Request], int]:
        """Evaluation's prompts, as many as are decoded, and the new tokens of an answer at most."""
        limit = min(self.run.file.evaluate.max_new_tokens, self.extent.max_new_tokens)
        return asked_prompts(self.run, self.extent.prompts), limit

    def _look_at_files(self, digest: str) -> None:
        run, record = self.run, read_record(self.run.stage_folder("train"))
        if not self.trained_here or record is None:
            return
        left = record.made.get(contents.OWN_DRAFT)
        drafts = [one / "draft" for one in reversed(checkpoints.complete(run.stage_folder("train")))]
        trained = next((draft for draft in drafts if fingerprint(draft) == left), None)
        with torch.device("meta"):
            described = run.plugins.registry.build(
                "draft", run.file.draft.type, run.file.draft.options, run.target.draft_adapter, run.file.target.layers
            )
        description = check_draft(self.folder, registry=run.plugins.registry, adapter=self.adapter)
        found, facts = draft_findings(
            self.folder,
            digest=digest,
            trained_digest=left,
            expected=expected_config(described, run.target.draft_adapter),
            trained=trained,
            anchor_predicts=(description.anchor_predicts, described.describe().anchor_predicts),
        )
        self.findings += found
        self.facts["draft"] = facts
        now, then = run.target.content_digest(), record.content.get(contents.TARGET)
        if then is not None and now != then:
            self._add(_another_target(then, now))
        self.facts["dtype"] = {"training": run.file.train.precision, "evaluation": dtype_name(run.target.dtype)}

    def _look_at_header(self, differences: dict[str, tuple[Any, Any]]) -> None:
        self.facts["cache"] = {name: {"cache": str(then), "now": str(now)} for name, (then, now) in differences.items()}
        if "revision" in differences and not any(one.name == "target" for one in self.findings):
            self._add(_another_target(*map(str, differences["revision"])))

    def _look_at_numbers(self, outcomes: Outcomes) -> None:
        if outcomes.unfit:
            dtype = dtype_name(self.run.target.dtype)
            self._add(
                Finding(
                    name="number format",
                    says=f"In {dtype}, {outcomes.unfit} of {int(outcomes.counted.sum())} outputs of the draft are no "
                    "finite numbers: it leaves the range of the format.",
                    fix='Evaluate in target.dtype = "bfloat16" or "float32".',
                    explains=(names.PRECISION, names.LIVE, names.HELD_OUT, names.PROMPTS),
                )
            )

    def _recorded(self) -> tuple[list[float], int]:
        """The shares of right tokens in the last lines of training's figures, and of how many samples they are."""
        lines, unreadable = read_lines(self.run.stage_folder("train") / METRICS)
        if unreadable:
            self.missing[f"lines of {METRICS}"] = f"{unreadable} of them cannot be read"
        rows = lines[-_LAST_LINES:]
        found = {name: [row[name] for row in rows if name in row] for row in rows for name in row}

        def mean(name: str) -> list[float]:
            positions = sorted((int(key[len(name) + 1 :]), key) for key in found if key.startswith(f"{name}@"))
            return [sum(found[key]) / len(found[key]) for _, key in positions]

        shares, groups = mean("accuracy"), len(rows) * self.run.file.train.global_batch_size
        if not shares:
            self.missing[names.RECORDED] = "training logged no figures by position"
            return [], 0
        self.stages.append(Stage(name=names.RECORDED, shares=shares, groups=groups, rates=mean("accept_rate")))
        return shares, groups

    def _live(self, samples: Sequence[Sample]) -> list[Sample]:
        return with_live_features(self.run, samples, self.draft.describe().taps)

    def _load(self, dtype: torch.dtype) -> DraftModel:
        return load_draft(
            self.folder,
            registry=self.run.plugins.registry,
            adapter=draft_adapter(self.folder, registry=self.run.plugins.registry),
            dtype=dtype,
            device=self.run.target.device,
        )

    def _measure(
        self, name: str, draft: DraftModel, samples: Sequence[Sample], *, compute_dtype: torch.dtype = torch.float32
    ) -> Outcomes:
        device, seed = self.run.target.device, self.run.file.run.seed
        said = list(said_of(draft, samples, device=device, seed=seed, compute_dtype=compute_dtype))
        outcomes = outcomes_of(said)
        self._stage(name, outcomes, rates=acceptance_rates(said))
        return outcomes

    def _stage(self, name: str, outcomes: Outcomes, *, rates: Sequence[float] = ()) -> None:
        self.last = outcomes
        self.stages.append(
            Stage(
                name=name,
                shares=outcomes.shares(),
                conditional=outcomes.conditional(),
                accepted=outcomes.accepted(),
                interval=accepted_interval(outcomes),
                blocks=outcomes.blocks,
                groups=outcomes.groups,
                unfit=outcomes.unfit,
                rates=rates,
            )
        )

    def _judge(self, difference: Difference, *, what: str = "draft tokens accepted a round") -> None:
        """Compare the newest stage with the one before it."""
        own, before = self.stages[-1], self.stages[-2].name
        self.stages[-1] = evolve(
            own, against=before, difference=difference, drops=difference.drops(self.tolerance), what=what
        )

    def _add(self, found: Finding | None) -> None:
        if found is not None:
            self.findings.append(found)


def _another_target(then: str, now: str) -> Finding:
    return Finding(
        name="target",
        says=f"The target is not the one that training read: its digest is {now[:16]}, and was {then[:16]}.",
        fix="Evaluate with the target that the draft was trained for, or train for this one.",
        explains=(names.LIVE, names.HELD_OUT, names.PROMPTS),
    )
