"""The evaluate stage: the run's draft on every task and temperature, then metrics.json and the report."""

from __future__ import annotations

import json
import os
import platform
import re
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from deepspec_core import __version__
from deepspec_core.blocks.published import load_draft
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request
from deepspec_core.evaluation.evaluator import Decoding, evaluate, summarise
from deepspec_core.evaluation.report import markdown
from deepspec_core.evaluation.tasks import HELD_OUT_QUOTA, Prompt, load_task
from deepspec_core.features.targets import fingerprint
from deepspec_core.pipeline.run import Run


def run_stage(run: Run) -> dict[str, Any]:
    """Evaluate; finished groups of prompts of an interrupted evaluation are kept."""
    options = run.file.evaluate
    draft_folder = run.base / options.draft if options.draft else run.folder / "draft"
    draft = load_draft(
        draft_folder, registry=run.plugins.registry, adapter=run.adapter, dtype=run.dtype, device=run.device
    )
    results = []
    for task in options.tasks:
        prompts = load_task(
            task,
            limit=options.limit,
            seed=options.seed,
            base=run.base,
            registry=run.plugins.registry,
            held_out=lambda: (
                {"id": row.id, "messages": row.messages}
                for row in islice(run.conversations("held_out"), options.limit or HELD_OUT_QUOTA)
            ),
        )
        for temperature in options.temperature:
            results.append(
                {"task": task, "temperature": temperature, **_evaluate(run, draft, prompts, task, temperature)}
            )
    report = _report(run, draft, draft_folder, results)
    _write(run.folder / "metrics.json", json.dumps(report, indent=1) + "\n")
    _write(run.folder / "report.md", markdown(report))
    run.plugins.manager.hook.deepspec_evaluation_finished(run=run, report=report)
    return {
        f"accepted length on {result['task']} at T={result['temperature']:g}": round(result["acceptance_length"], 3)
        for result in results
    }


def _evaluate(run: Run, draft: DraftModel, prompts: list[Prompt], task: str, temperature: float) -> dict[str, Any]:
    options, architecture = run.file.evaluate, run.adapter.architecture
    requests = [
        Request(
            id=prompt.id,
            prompt_ids=run.tokenizer.render_prompt(prompt.messages, run.file.data.system_prompt),
            seed=options.seed + prompt.index,
        )
        for prompt in prompts
    ]
    fitting = [request for request in requests if len(request.prompt_ids) < architecture.max_positions]
    longest = max(len(request.prompt_ids) for request in fitting)
    decoding = Decoding(
        target=run.target,
        proposer=draft.proposer(),
        sampling=Sampling(temperature=temperature),
        stop_ids=architecture.stop_token_ids,
        max_new_tokens=options.max_new_tokens,
        max_length=min(architecture.max_positions, longest + options.max_new_tokens),
        batch_size=options.batch_size,
        plain=options.plain,
    )
    name = re.sub(r"[^\w.-]", "_", Path(task).stem if task.endswith(".jsonl") else task)
    groups = evaluate(
        fitting,
        decoding,
        journal=run.stage_folder("evaluate") / f"{name}-t{temperature:g}.jsonl",
        what=f"evaluate {task} at temperature {temperature:g}",
    )
    return {**summarise(groups, seed=options.seed), "prompts_too_long": len(requests) - len(fitting)}


def _report(run: Run, draft: DraftModel, draft_folder: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    description, architecture = draft.describe(), run.adapter.architecture
    sizes = {name: parameter.numel() for name, parameter in draft.named_parameters()}
    frozen = sum(count for name, count in sizes.items() if name.startswith(("embed_tokens.", "lm_head.")))
    return {
        "run": run.file.run.name,
        "draft": {
            "algorithm": description.algorithm,
            "checkpoint": os.path.relpath(draft_folder, run.folder),
            "parameters": sum(sizes.values()),
            "trainable_parameters": sum(sizes.values()) - frozen,
            "num_layers": description.num_layers,
            "max_tokens": description.max_tokens,
            "taps": list(description.taps),
        },
        "target": {
            "model": run.file.target.model,
            "revision": fingerprint(run.where, revision=run.file.target.revision),
            "num_layers": architecture.num_layers,
            "dtype": str(run.dtype).removeprefix("torch."),
        },
        "settings": {
            "max_new_tokens": run.file.evaluate.max_new_tokens,
            "batch_size": run.file.evaluate.batch_size,
            "seed": run.file.evaluate.seed,
            "system_prompt": run.file.data.system_prompt,
            "thinking": run.file.regenerate.thinking,
        },
        "machine": {
            "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deepspec-core": __version__,
        },
        "plugins": run.plugin_versions,
        "results": results,
    }


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
