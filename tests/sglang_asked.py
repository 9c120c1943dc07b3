"""What SGLang's own package makes of exported drafts on a CPU, run by the interpreter of an environment that has it.

    python sglang_asked.py CASES TARGET

CASES has a folder for each draft: `export/`, `case.json` and `given.safetensors`; found.json and found.safetensors are
written there, and targets.json beside them. Everything that is reported comes from SGLang's code: its reading of its
command line and of config.json, its loaders of weights, its target and its drafts with its attention in plain PyTorch.
Knows SGLang 0.5.23; nothing of DeepSpec. Of a round, only the order of the calls is the script's.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import warnings
from pathlib import Path

CASES, TARGET = Path(sys.argv[1]), sys.argv[2]
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
warnings.simplefilter("ignore")

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import import_utils

# Transformers looks for what prepares images before there is a stub of it, and remembers that it is not there.
assert not import_utils.is_torchvision_available()
assert not import_utils.is_torchvision_greater_or_equal("0.1")
STUBS = ("sgl_kernel", "torchvision")


class Stub(type):
    """A name of a package that is not installed. It can be imported; nothing of it can be called."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_, **__):
        raise NotImplementedError(f"of {' or '.join(STUBS)}, which are not installed")


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages of compiled kernels and of images, whose names SGLang imports on a CPU and does not use for a draft."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STUBS else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(Stub("Stub", (), {}), name)
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(Stubs())

from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import configure_aux_hidden_state_capture
from sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state import resolve_spec_aux_hidden_state_config
from sglang.srt.model_loader import get_model
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import SpawnRanks, get_spec, publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2
from sglang.srt.speculative.dspark_components import dspark_draft
from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

SETTINGS = {"model_path": TARGET, "dtype": "float32", "attention_backend": "torch_native"}
SETTINGS |= {"disable_cuda_graph": True, "disable_overlap_schedule": True}
FAMILIES = ("Qwen2", "Qwen3", "Qwen3Moe", "Llama", "Mistral", "Gemma3", "Gemma4")

server = ServerArgs(device="cpu", **SETTINGS)
publish(server, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
meeting = f"file://{CASES / 'meeting'}"
init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method=meeting)
initialize_model_parallel(backend="gloo")
target_config = ModelConfig.from_server_args(server)


def load(config):
    """A model, by SGLang's loader of checkpoints."""
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


class Cache:
    """One request's keys and values, at places 1 to N, and SGLang's attention in PyTorch over them."""

    def __init__(self, config, length):
        text = config.hf_text_config
        sizes = (text.num_key_value_heads, text.head_dim, text.num_hidden_layers)
        self.pool = MHATokenToKVPool(length + 1, 1, torch.float32, *sizes, "cpu", False)
        requests = ReqToTokenPool(1, length, "cpu", False)
        requests.req_to_token[1] = torch.arange(1, length + 1)
        runner = types.SimpleNamespace(device="cpu", req_to_token_pool=requests, token_to_kv_pool=self.pool)
        self.attention = TorchNativeAttnBackend(runner)

    def run(self, forward, ids, start, mode=ForwardMode.EXTEND, **more):
        """What `forward` computes of these tokens, from position `start`."""
        end = start + len(ids)
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=1,
            input_ids=ids,
            req_pool_indices=torch.tensor([1]),
            seq_lens=torch.tensor([end]),
            out_cache_loc=torch.arange(start + 1, end + 1),
            seq_lens_sum=end,
            positions=torch.arange(start, end),
            extend_prefix_lens=torch.tensor([start]),
            extend_seq_lens=torch.tensor([len(ids)]),
            **more,
        )
        self.attention.init_forward_metadata(batch)
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.attention)):
            return forward(ids, batch.positions, batch)


def command_line(algorithm, draft):
    """What SGLang makes of its options with this draft."""
    more = {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(draft)}
    if algorithm == "EAGLE3":
        more |= {"speculative_num_steps": 4, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 5}
        arguments = ServerArgs(device="cpu", **SETTINGS, **more)
        arguments.resolve_once()
    else:
        # SGLang refuses these two on a CPU before it reads the draft, so the device has another name here.
        arguments = ServerArgs(device="cuda", **SETTINGS, **more)
        {"DFLASH": speculative_hook._handle_dflash, "DSPARK": speculative_hook._handle_dspark}[algorithm](arguments)
    return resolving_view(arguments)


def unloaded(model, weights):
    """What these weights leave without a value; the loader's error where it raises."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    if hasattr(model, "hot_token_id"):
        model.hot_token_id = None
    try:
        model.load_weights(iter(weights.items()))
    except ValueError as error:
        return {str(error)}
    left = {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
    return left | ({"hot_token_id"} if getattr(model, "hot_token_id", 0) is None else set())


def without_each(model, weights, left):
    """Names of weights whose absence changes nothing: SGLang skips them."""
    return [
        name
        for name in weights
        if unloaded(model, {other: value for other, value in weights.items() if other != name}) == left
    ]


def captured(aux, ids):
    """The target, set to give a draft its features; the features of a text; the layers before which it takes them."""
    target = load(target_config)
    configure_aux_hidden_state_capture(
        model=target,
        eagle_use_aux_hidden_state=aux.eagle_use_aux_hidden_state,
        eagle_aux_hidden_state_layer_ids=aux.eagle_aux_hidden_state_layer_ids,
        dflash_use_aux_hidden_state=aux.dflash_use_aux_hidden_state,
        dflash_target_layer_ids=aux.dflash_target_layer_ids,
        is_dspark=aux.is_dspark,
    )
    _, features = Cache(target_config, len(ids)).run(target.model, ids, 0)
    return target, torch.cat(features, -1), list(target.model.layers_to_capture)


def eagle3(model, config, target, given):
    """Logits over the draft's vocabulary of a chain of given proposals."""
    if model.load_lm_head_from_target:
        model.set_embed_and_head(target.model.embed_tokens.weight, target.lm_head.weight)
    else:
        model.set_embed(target.model.embed_tokens.weight)
    hidden, proposed, context = given["features"], given["proposed"], len(given["features"])
    cache = Cache(config, context + len(proposed))
    inputs, start, mode, logits = given["ids"][1 : context + 1], 0, ForwardMode.EXTEND, []
    for step in range(len(proposed)):
        spec = types.SimpleNamespace(hidden_states=hidden)
        output, (hidden,) = cache.run(model.model, inputs, start, mode, spec_info=spec)
        logits.append(output[-1] @ model.lm_head.weight[: model.config.draft_vocab_size].T)
        hidden, inputs, mode, start = hidden[-1:], proposed[step : step + 1], ForwardMode.DECODE, context + step
    return {"logits": torch.stack(logits)}


def block(model, config, target, given, *, mask, slots):
    """The hidden states of a block's slots after the context."""
    features, context = given["features"], len(given["features"])
    cache, positions = Cache(config, context + slots), torch.arange(context)
    with torch.no_grad():
        if hasattr(model, "write_target_hidden_kv"):
            where = {"pool": cache.pool, "positions": positions, "cache_loc": positions + 1}
            model.write_target_hidden_kv(target_hidden=features, **where)
        else:
            runner = types.SimpleNamespace(token_to_kv_pool=cache.pool)
            worker = types.SimpleNamespace(draft_model=model, draft_model_runner=runner)
            projected = model.project_target_hidden(features)
            DFlashWorkerV2._append_target_hidden_sequential(worker, projected, positions, positions + 1)
        inputs = torch.full((slots,), mask)
        inputs[0] = given["ids"][context]
        embedded = target.model.embed_tokens(inputs)
    return cache.run(lambda *seen: model(*seen, input_embeds=embedded), inputs, context).hidden_states


def dspark(model, config, target, given, *, mask, gamma):
    """Logits of a block with its Markov head, after given proposals, and the confidence in them."""
    model.attach_shared_modules(embed_tokens=target.model.embed_tokens, lm_head=target.lm_head)
    proposed, context = given["proposed"], len(given["features"])
    anchor = given["ids"][context : context + 1]
    slots = gamma if model.sample_from_anchor else gamma + 1
    hidden = block(model, config, target, given, mask=mask, slots=slots)
    if not model.sample_from_anchor:
        hidden, _ = dspark_draft.select_draft_hidden_without_anchor(hidden, bs=1, gamma=gamma)
    with torch.no_grad():
        base, features = model.compute_base_logits(hidden)
        state, before, logits = model.markov_head.init_state(hidden[None]), anchor, []
        for step in range(gamma):
            bias, state = model.markov_head.step_bias(before, hidden_states=hidden[None, step], state=state)
            logits.append(base[step] + bias[0])
            before = proposed[step : step + 1]
        found = {"logits": torch.stack(logits)}
        if model.confidence_head is not None:
            seen = {"anchor_tokens": anchor, "draft_tokens": proposed[None], "confidence_features": features}
            found["confidence"] = model.compute_confidence(**seen)[1][0]
    return found


def ask(case):
    """Everything about one draft."""
    draft, given = case / "export", load_file(case / "given.safetensors")
    told = json.loads((case / "case.json").read_text())
    algorithm, os.environ["SGLANG_RAGGED_VERIFY_MODE"] = told["algorithm"], told["verify_mode"]
    found = {"num_draft_tokens": command_line(algorithm, draft).speculative_num_draft_tokens}
    named = SpeculativeAlgorithm.from_string(algorithm)
    with get_spec().override(speculative_draft_model_path=str(draft)):
        aux = resolve_spec_aux_hidden_state_config(
            server_args=server, model_config=target_config, spec_algorithm=named, is_draft_worker=False
        )
    config = ModelConfig.from_server_args(server, model_path=str(draft), is_draft_model=True)
    model, weights = load(config), load_file(draft / "model.safetensors")
    left = unloaded(model, weights)
    found |= {"class": type(model).__name__, "layers": aux.draft_kv_num_layers, "missing": sorted(left)}
    found["skipped"] = without_each(model, weights, left)
    unloaded(model, weights)
    target, features, found["captured_before"] = captured(aux, given["text"])
    if algorithm == "EAGLE3":
        hot = model.get_hot_token_id()
        found |= {"hot_token_ids": None if hot is None else hot.tolist()}
        found["draft_vocab_size"] = model.config.draft_vocab_size
        tensors = eagle3(model, config, target, given)
    else:
        attention = [layer.self_attn for layer in model.layers]
        found["windows"] = [one.sliding_window_size for one in attention]
        found["attention"] = sorted({one.attn_type.name for one in attention})
    if algorithm == "DFLASH":
        mask = model.draft_config.mask_token_id
        found |= {"block_size": model.block_size, "mask_token_id": mask}
        hidden = block(model, config, target, given, mask=mask, slots=model.block_size)
        tensors = {"logits": hidden[1:] @ target.lm_head.weight.T}
    elif algorithm == "DSPARK":
        runtime = resolve_runtime_config(
            draft_hf_config=config.hf_config,
            speculative_num_draft_tokens=None,
            target_vocab_size=target_config.vocab_size,
        )
        found |= {"block_size": runtime.gamma, "mask_token_id": runtime.mask_token_id}
        found |= {"sample_from_anchor": model.sample_from_anchor, "markov_head": type(model.markov_head).__name__}
        tensors = dspark(model, config, target, given, mask=runtime.mask_token_id, gamma=runtime.gamma)
    tensors = {name: tensor.detach().contiguous() for name, tensor in (tensors | {"features": features}).items()}
    save_file(tensors, case / "found.safetensors")
    return found


def give_layers(family):
    """Which drafts SGLang's class of a target gives the outputs of its layers to."""
    model, _ = ModelRegistry.resolve_model_cls([f"{family}ForCausalLM"])
    hooks = ("set_eagle3_layers_to_capture", "set_dflash_layers_to_capture", "set_dspark_layers_to_capture")
    return {"class": model.__name__, "gives": [name.split("_")[1] for name in hooks if hasattr(model, name)]}


for case in sorted(path for path in CASES.iterdir() if path.is_dir()):
    try:
        answer = ask(case)
    except Exception as error:
        answer = {"refused": f"{type(error).__name__}: {error}"}
    (case / "found.json").write_text(json.dumps(answer))
(CASES / "targets.json").write_text(json.dumps({family: give_layers(family) for family in FAMILIES}))
